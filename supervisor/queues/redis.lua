-- One queue in Redis: everything that is done to it, each call one atomic step. `redis.py` says what the keys are.
--
-- KEYS[1]  {supervisor:NAME}, what all keys begin with, so that they live on one node of a cluster
-- ARGV[1]  MessagePack: the limits of the queue, as the caller has them
-- ARGV[2]  MessagePack: what is asked, a list of {verb, argument...}
--
-- Answers with a list, one for each that was asked: {MessagePack of the answer, payload, payload...}

local call, encode, decode = redis.call, cmsgpack.pack, cmsgpack.unpack
local PREFIX = KEYS[1] .. ':'
local ITEMS, PAYLOADS, RESULTS, ERRORS = PREFIX .. 'items', PREFIX .. 'payloads', PREFIX .. 'results', PREFIX .. 'errors'
local CONTROL, UNIQUE, UNTIL = PREFIX .. 'control', PREFIX .. 'unique', PREFIX .. 'until'
local DELAYED, PARKED, EXPIRING, RUNNING = PREFIX .. 'delayed', PREFIX .. 'parked', PREFIX .. 'expiring', PREFIX .. 'running'
local GROUPS, NEWS = PREFIX .. 'groups', PREFIX .. 'news'
local ENDED = { 'done', 'dead', 'cancelled', 'expired' }
local BULK = 1000          -- so many at most in one step: nobody else is served meanwhile
local HEAVY = 16777216     -- bytes of payload in one answer, unless one item alone has more
local REMEMBERED = 50000   -- ids of items that are done and gone, twice at most
local REMEMBER = 600       -- and so many seconds

local limits, asked = decode(ARGV[1]), decode(ARGV[2])

-- Which of these commands the user may not run (a server before 7.0 does not say). Nothing else is done in this call.
if asked[1][1] == 'refused' then
  local refused = {}
  for _, name in ipairs(redis.acl_check_cmd and asked[1][2] or {}) do
    local key = name == 'PUBLISH' and NEWS or ITEMS
    if not redis.acl_check_cmd(name, key, key, key) then refused[#refused + 1] = name end
  end
  return { { encode(refused) } }
end

local time = call('TIME')
local NOW = tonumber(time[1]) + tonumber(time[2]) / 1000000
local MICROS = tonumber(time[1]) * 1000000 + tonumber(time[2])

-- A write before all others: where nothing may be written (no memory, a replica) nothing is done by half.
local new = call('HSET', CONTROL, 'at', MICROS) == 1 and call('HLEN', CONTROL) == 1

local found = call('HMGET', CONTROL, 'seq', 'top', 'paused', 'hungry', 'need', 'rate', 'expired', 'which', 'alarm')
local control = {
  seq = tonumber(found[1]) or 0,          -- the last number given to an item
  top = tonumber(found[2]) or 0,          -- the least urgent priority that anything ever had
  paused = found[3] == '1',
  hungry = found[4] == '1',               -- a claim left nothing that may run: who brings something says so
  need = tonumber(found[5]) or 0,         -- a producer waits for so much room
  rate = tonumber(found[6]) or 0,         -- when the bucket of the rate is full again
  expired = tonumber(found[7]) or 0,      -- since a claim told of it
  which = tonumber(found[8]) or 0,        -- which of the two sets of remembered ids is filled
  alarm = tonumber(found[9]) or 0,        -- when all who are hungry look again by themselves: they have been told so
}
local before = {}
for name, value in pairs(control) do before[name] = value end

-- ---- what is told to others, once, at the end ----

local wake_now, wake, over, told = false, nil, {}, {}

local function wakes(delay)
  if delay <= 0 then
    wake_now = true
  elseif not wake or delay < wake then
    wake = delay
  end
end

local function tell(...)
  told[#told + 1] = encode({ ... })
end

-- ---- small things ----

local function many(command, key, list)
  for first = 1, #list, BULK do
    call(command, key, unpack(list, first, math.min(first + BULK - 1, #list)))
  end
end

local function load(id)
  local raw = call('HGET', ITEMS, id)
  return raw and decode(raw)
end

local function save(id, item)
  call('HSET', ITEMS, id, encode(item))
end

-- Somebody waits for its end.
local function awaited(id)
  local item = load(id)
  if item and not item.keep then
    item.keep = true
    save(id, item)
  end
end

local function ready(prio)
  return PREFIX .. 'ready:' .. prio
end

local function parked(prio, group)
  return PREFIX .. 'parked:' .. prio .. ':' .. group
end

-- Members of what waits: those of one moment are in the order in which they were put.
local function member(id, item)
  return string.format('%03d%015.0f', item.prio, item.seq) .. id
end

local function of_member(text)
  return text:sub(19), tonumber(text:sub(1, 3))
end

local function waiting()
  local number = call('HLEN', ITEMS) - call('ZCARD', RUNNING)
  for _, state in ipairs(ENDED) do number = number - call('ZCARD', PREFIX .. state) end
  return number
end

local function remembered(id)
  return call('SISMEMBER', PREFIX .. 'gone:0', id) == 1 or call('SISMEMBER', PREFIX .. 'gone:1', id) == 1
end

local function remember(ids)
  if #ids == 0 then return end
  if call('SCARD', PREFIX .. 'gone:' .. control.which) + #ids > REMEMBERED then
    control.which = 1 - control.which
    call('UNLINK', PREFIX .. 'gone:' .. control.which)
  end
  local key = PREFIX .. 'gone:' .. control.which
  many('SADD', key, ids)
  call('EXPIRE', key, REMEMBER)
end

-- ---- an item's life ----

local function frees_key(id, item)
  if item.key and not call('ZSCORE', UNTIL, item.key) and call('HGET', UNIQUE, item.key) == id then
    call('HDEL', UNIQUE, item.key)
  end
end

local function place(id, item)
  item.state = 'waiting'
  if item.ready > NOW then
    call('ZADD', DELAYED, item.ready, member(id, item))
  else
    call('ZADD', ready(item.prio), item.ready, member(id, item))
  end
  if item.expires then call('ZADD', EXPIRING, item.expires, id) end
  wakes(math.max(item.ready - NOW, 0))
end

-- As many of a group as may run stand in line; the others are parked, so that a claim need not pass them each time.
local function unpark(group)
  local room = limits.per_key - (tonumber(call('HGET', GROUPS, group)) or 0)
  for prio = 0, control.top do
    if room <= 0 then return end
    local moved = call('ZPOPMIN', parked(prio, group), room)
    for at = 1, #moved, 2 do
      call('ZREM', PARKED, moved[at])
      call('ZADD', ready(prio), moved[at + 1], moved[at])
      wakes(0)
    end
    room = room - #moved / 2
  end
end

local function unplace(id, item)
  local it = member(id, item)
  if call('ZREM', DELAYED, it) == 0 and call('ZREM', ready(item.prio), it) == 0 and item.group then
    call('ZREM', PARKED, it)
    call('ZREM', parked(item.prio, item.group), it)
  end
  if item.expires then call('ZREM', EXPIRING, id) end
  if item.group then unpark(item.group) end
end

local function release(id, item)
  call('ZREM', RUNNING, id)
  if item.group then
    if call('HINCRBY', GROUPS, item.group, -1) <= 0 then call('HDEL', GROUPS, item.group) end
    unpark(item.group)
  end
  if limits.concurrency then wakes(0) end
end

local function finish(id, item, state)
  frees_key(id, item)
  item.state, item.ended, item.client, item.cancelling = state, NOW, nil, nil
  call('ZADD', PREFIX .. state, NOW, id)
  save(id, item)
  if item.keep then over[#over + 1] = id end
end

local function forget(ids)
  if #ids == 0 then return end
  for _, key in ipairs({ ITEMS, PAYLOADS, RESULTS, ERRORS }) do many('HDEL', key, ids) end
end

local function again(id, item, at)
  if item.expires then item.expires = at + item.expires - item.ready end
  item.ready = at
  place(id, item)
  save(id, item)
end

-- What has waited for too long, some of it; gives how many.
local function expire()
  local late = call('ZRANGEBYSCORE', EXPIRING, '-inf', NOW, 'LIMIT', 0, BULK)
  for _, id in ipairs(late) do
    local item = load(id)
    call('ZREM', EXPIRING, id)
    if item then
      unplace(id, item)
      finish(id, item, 'expired')
      control.expired = control.expired + 1
    end
  end
  return #late
end

-- What is due by the clock. Not for those who end or renew what they have: who is late, but first, is in time.
local function tidy()
  for _, id in ipairs(call('ZRANGEBYSCORE', RUNNING, '-inf', NOW, 'LIMIT', 0, BULK)) do
    local item = load(id)
    if item then
      release(id, item)
      tell('lost', id, item.token)
      if item.cancelling then
        finish(id, item, 'cancelled')
      else
        call('HSET', ERRORS, id, limits.worker_lost)
        again(id, item, NOW)
      end
    else
      call('ZREM', RUNNING, id)
    end
  end
  expire()
  local due = call('ZRANGEBYSCORE', DELAYED, '-inf', NOW, 'WITHSCORES', 'LIMIT', 0, BULK)
  for at = 1, #due, 2 do
    local _, prio = of_member(due[at])
    call('ZREM', DELAYED, due[at])
    call('ZADD', ready(prio), due[at + 1], due[at])
    wakes(0)
  end
  for _, state in ipairs({ 'done', 'cancelled', 'expired' }) do
    local old = call('ZRANGEBYSCORE', PREFIX .. state, '-inf', NOW - limits.keep, 'LIMIT', 0, BULK)
    if #old > 0 then
      many('ZREM', PREFIX .. state, old)
      forget(old)
    end
  end
  local free = call('ZRANGEBYSCORE', UNTIL, '-inf', NOW, 'LIMIT', 0, BULK)
  if #free > 0 then
    many('ZREM', UNTIL, free)
    many('HDEL', UNIQUE, free)
  end
end

-- An item as people see it, and what belongs to it: payload, result, error.
local function record(id, item)
  item.id, item.late = id, item.ready > NOW or nil
  if item.state == 'running' then item.lease = tonumber(call('ZSCORE', RUNNING, id)) end
  return item
end

local function records(ids)
  local rows, answer = {}, { '' }
  for _, id in ipairs(ids) do
    local item = load(id)
    if item then
      rows[#rows + 1] = record(id, item)
      for _, key in ipairs({ PAYLOADS, RESULTS, ERRORS }) do
        answer[#answer + 1] = call('HGET', key, id) or ''
      end
    end
  end
  answer[1] = encode(rows)
  return answer
end

-- ---- producers ----

local verbs = {}

-- What becomes of each draft, one after another; nothing is done yet.
local function judge(drafts)
  local receipts, stored, mine, fresh = {}, {}, {}, 0
  for at, draft in ipairs(drafts) do
    local what, whose = 'stored', draft.id
    if stored[draft.id] or call('HEXISTS', ITEMS, draft.id) == 1 or draft.again and remembered(draft.id) then
      what = 'known'
    elseif draft.key and limits.on_conflict then
      local holder = mine[draft.key] or call('HGET', UNIQUE, draft.key)
      if holder and limits.on_conflict == 'replace' then
        local item = not stored[holder] and load(holder)
        what = (stored[holder] or item and item.state == 'waiting') and 'replaced' or 'rejected'
      elseif holder then
        what = limits.on_conflict == 'merge' and 'merged' or 'rejected'
      end
      whose = (what == 'merged' or what == 'rejected') and holder or draft.id
      draft.instead = what == 'replaced' and holder
    end
    if what == 'stored' or what == 'replaced' then
      stored[draft.id] = true
      if draft.key then mine[draft.key] = draft.id end
      if what == 'stored' then fresh = fresh + 1 end
    else
      draft.nothing = true
    end
    receipts[at] = { whose, what }
  end
  return receipts, fresh
end

local function store(draft)
  local item = {
    prio = draft.priority, put = NOW, ready = math.max(NOW + draft.delay, draft.at or 0), tries = 0, token = 0,
    key = draft.key, group = draft.group, keep = draft.keep or nil,
  }
  local old = draft.instead and load(draft.instead)
  if old then
    unplace(draft.instead, old)
    forget({ draft.instead })
    if old.keep then over[#over + 1] = draft.instead end
    item.seq = old.seq
    if item.ready <= NOW and item.prio == old.prio then item.ready = math.min(old.ready, NOW) end
  else
    control.seq = control.seq + 1
    item.seq = control.seq
  end
  if draft.expire then item.expires = math.max(NOW + draft.delay, draft.at or 0) + draft.expire end
  control.top = math.max(control.top, item.prio)
  if item.key and limits.on_conflict then
    call('HSET', UNIQUE, item.key, draft.id)
    if limits.unique_for then call('ZADD', UNTIL, NOW + limits.unique_for, item.key) else call('ZREM', UNTIL, item.key) end
  end
  call('HSET', PAYLOADS, draft.id, draft.payload)
  place(draft.id, item)
  save(draft.id, item)
end

function verbs.put(drafts)
  tidy()
  local receipts, fresh = judge(drafts)
  while fresh > 0 and waiting() + fresh > limits.size do
    if expire() == 0 then
      control.need = control.need > 0 and math.min(control.need, fresh) or fresh
      local first = call('ZRANGE', EXPIRING, 0, 0, 'WITHSCORES')
      return { encode({ full = first[2] and tonumber(first[2]) - NOW or -1 }) }
    end
  end
  for at, draft in ipairs(drafts) do
    if not draft.nothing then
      store(draft)
    elseif draft.keep and receipts[at][2] ~= 'rejected' then -- who put it waits for the end of the other
      awaited(receipts[at][1])
    end
  end
  return { encode(receipts) }
end

-- ---- workers ----

local function tokens()
  if not limits.rate then return math.huge end
  return math.floor(limits.burst - math.max(control.rate - NOW, 0) * limits.rate + 1e-6)
end

local function began(number)
  if limits.rate then control.rate = math.max(control.rate, NOW) + number / limits.rate end
end

-- Seconds until the clock alone may bring something.
local function next_due()
  if control.paused then return -1 end
  local soonest
  for _, key in ipairs({ DELAYED, RUNNING }) do
    local first = call('ZRANGE', key, 0, 0, 'WITHSCORES')
    if first[2] then soonest = math.min(soonest or math.huge, tonumber(first[2]) - NOW) end
  end
  if limits.rate and tokens() < 1 then
    soonest = math.min(soonest or math.huge, control.rate - NOW - (limits.burst - 1) / limits.rate)
  end
  return soonest and math.max(soonest, 0) or -1
end

-- Whether another claim may bring something now.
local function has_more()
  if control.paused or tokens() < 1 or limits.concurrency and call('ZCARD', RUNNING) >= limits.concurrency then
    return false
  end
  for prio = 0, control.top do
    if call('EXISTS', ready(prio)) == 1 then return true end
  end
  return false
end

local function run(id, item, owner, client)
  item.state, item.tries, item.began, item.owner, item.client = 'running', item.tries + 1, NOW, owner, client
  item.token = math.max(MICROS, item.token + 1)
  item.done, item.total = nil, nil
  if limits.unique_queued then frees_key(id, item) end
  if item.expires then call('ZREM', EXPIRING, id) end
  if item.group then call('HINCRBY', GROUPS, item.group, 1) end
  call('ZADD', RUNNING, NOW + limits.lease, id)
  save(id, item)
end

local function bury(id, item)
  if item.expires then call('ZREM', EXPIRING, id) end
  if call('HEXISTS', ERRORS, id) == 0 then call('HSET', ERRORS, id, limits.no_attempt) end
  finish(id, item, 'dead')
  if item.group then unpark(item.group) end
end

local function take_from(prio, want, attempts, owner, client, got)
  local line = ready(prio)
  while #got.items < want and got.looked < want + BULK and got.bytes < HEAVY do
    local popped = call('ZPOPMIN', line, math.min(want - #got.items, 100))
    if #popped == 0 then return end
    for at = 1, #popped, 2 do
      local id = of_member(popped[at])
      local item = got.bytes < HEAVY and load(id)
      got.looked = got.looked + 1
      if got.bytes >= HEAVY then
        call('ZADD', line, popped[at + 1], popped[at])
      elseif not item then
        -- its data was taken away behind our back
      elseif item.tries >= attempts then
        bury(id, item)
        got.dead[#got.dead + 1] = id
      elseif item.group and (tonumber(call('HGET', GROUPS, item.group)) or 0) >= limits.per_key then
        call('ZADD', parked(prio, item.group), popped[at + 1], popped[at])
        call('ZADD', PARKED, popped[at + 1], popped[at])
      else
        run(id, item, owner, client)
        local payload = call('HGET', PAYLOADS, id) or 'null'
        got.bytes = got.bytes + #payload
        got.items[#got.items + 1] = { id, item.token, item.tries, item.prio, item.put, item.ready, item.group }
        got.payloads[#got.payloads + 1] = payload
      end
    end
  end
end

function verbs.claim(limit, owner, attempts, order, client)
  tidy()
  local got = { items = {}, payloads = {}, dead = {}, looked = 0, bytes = 0 }
  local want = control.paused and 0 or math.min(limit, tokens())
  if limits.concurrency then want = math.min(want, limits.concurrency - call('ZCARD', RUNNING)) end
  if want > 0 then
    local first = {}
    for _, prio in ipairs(order) do
      first[prio] = true
      take_from(prio, want, attempts, owner, client, got)
    end
    for prio = 0, control.top do
      if not first[prio] then take_from(prio, want, attempts, owner, client, got) end
    end
    began(#got.items)
  end
  local more = got.looked >= want + BULK or got.bytes >= HEAVY or #got.items >= want and has_more()
  local due = more and 0 or next_due()
  if due ~= 0 then
    control.hungry = true
    if wake_now then -- what came in this call is taken, or waits for the clock
      wake_now = false
      if due > 0 then wakes(due) end
    end
    if control.alarm > NOW then due = math.min(due > 0 and due or math.huge, control.alarm - NOW) end
  end
  local dead = records(got.dead)
  local answer = { encode({ got.items, decode(dead[1]), control.expired, due }) }
  control.expired = 0
  for _, payload in ipairs(got.payloads) do answer[#answer + 1] = payload end
  for at = 2, #dead do answer[#answer + 1] = dead[at] end
  return answer
end

local function held(id, token)
  local item = load(id)
  return item and item.state == 'running' and item.token == token and item
end

function verbs.renew(claims)
  local answer = {}
  for at, claim in ipairs(claims) do
    local item = held(claim[1], claim[2])
    if item then call('ZADD', RUNNING, NOW + limits.lease, claim[1]) end
    answer[at] = item and (item.cancelling and 2 or 1) or 0
  end
  return { encode(answer) }
end

local function settle(ending, item, gone)
  local id, how = ending.id, ending.how
  release(id, item)
  if item.cancelling and (how == 'retry' or how == 'back') then how = 'cancelled' end
  if how == 'done' and not ending.result and not item.keep then
    frees_key(id, item)
    gone[#gone + 1] = id
    return
  end
  if how ~= 'back' then
    if ending.error then call('HSET', ERRORS, id, ending.error) else call('HDEL', ERRORS, id) end
  end
  if how == 'retry' then
    again(id, item, NOW + ending.delay)
  elseif how == 'back' then
    item.tries, item.client = item.tries - 1, nil
    place(id, item)
    save(id, item)
  else
    if ending.result then call('HSET', RESULTS, id, ending.result) end
    finish(id, item, how)
  end
end

function verbs.finish(endings)
  local answer, gone = {}, {}
  for at, ending in ipairs(endings) do
    local item = held(ending.id, ending.token)
    answer[at] = item and true or false
    if item then settle(ending, item, gone) end
  end
  forget(gone)
  remember(gone)
  return { encode(answer) }
end

function verbs.progress(id, token, done, total)
  local item = held(id, token)
  if item then
    item.done, item.total = done, total or nil
    save(id, item)
  end
  return { encode(item and true or false) }
end

-- A client is connected again: what of its claims it has lost, and back with those of which it never heard.
function verbs.rejoin(client, claims)
  local known, answer = {}, {}
  for at, claim in ipairs(claims) do
    local item = held(claim[1], claim[2])
    known[claim[1]] = true
    answer[at] = item and (item.cancelling and 2 or 1) or 0
  end
  for _, id in ipairs(call('ZRANGE', RUNNING, 0, -1)) do
    local item = not known[id] and load(id)
    if item and item.client == client then settle({ id = id, how = 'back' }, item, {}) end
  end
  return { encode({ control.paused, call('HEXISTS', CONTROL, 'settings') == 1, answer }) }
end

function verbs.look()
  return { encode({ control.paused, call('HEXISTS', CONTROL, 'settings') == 1 }) }
end

-- ---- people ----

function verbs.cancel(id)
  tidy()
  local item, what = load(id), 'ended'
  if not item then
    what = 'unknown'
  elseif item.state == 'waiting' then
    what = 'cancelled'
    unplace(id, item)
    finish(id, item, 'cancelled')
  elseif item.state == 'running' then
    what = 'running'
    item.cancelling = true
    save(id, item)
    tell('cancel', id, item.token)
  end
  return { encode(what) }
end

-- `ids` false: the first of all.
function verbs.requeue(ids)
  local number = 0
  for _, id in ipairs(ids or call('ZRANGE', PREFIX .. 'dead', 0, BULK - 1)) do
    local item = load(id)
    if item and item.state == 'dead' then
      call('ZREM', PREFIX .. 'dead', id)
      item.tries, item.ended = 0, nil
      again(id, item, NOW)
      number = number + 1
    end
  end
  return { encode(number) }
end

-- Up to BULK members of what waits, in the order of claims.
local function line(most)
  local ids = {}
  local function add(key)
    for _, text in ipairs(call('ZRANGE', key, 0, most - 1)) do ids[#ids + 1] = (of_member(text)) end
  end
  for prio = 0, control.top do add(ready(prio)) end
  add(PARKED)
  add(DELAYED)
  return ids
end

function verbs.purge(state)
  tidy()
  local ids = state == 'waiting' and line(BULK) or call('ZRANGE', PREFIX .. state, 0, BULK - 1)
  for _, id in ipairs(ids) do
    local item = load(id)
    if item and state == 'waiting' then unplace(id, item) end
    if item then frees_key(id, item) end
  end
  if state ~= 'waiting' and #ids > 0 then many('ZREM', PREFIX .. state, ids) end
  forget(ids)
  return { encode(#ids) }
end

function verbs.pause(paused)
  if control.paused ~= paused then tell(paused and 'paused' or 'resumed') end
  control.paused = paused
  return { encode(true) }
end

function verbs.counts()
  tidy()
  local answer = { running = call('ZCARD', RUNNING), delayed = call('ZCARD', DELAYED), paused = control.paused }
  local late = call('ZCOUNT', EXPIRING, '-inf', NOW) -- more than `tidy` does in one step
  answer.waiting = waiting() - answer.delayed - late
  for _, state in ipairs(ENDED) do answer[state] = call('ZCARD', PREFIX .. state) end
  answer.expired = answer.expired + late
  local lines = { PARKED }
  for prio = 0, control.top do lines[#lines + 1] = ready(prio) end
  for _, key in ipairs(lines) do
    local first = call('ZRANGE', key, 0, 0, 'WITHSCORES')
    if first[2] then answer.oldest = math.max(answer.oldest or 0, NOW - tonumber(first[2])) end
  end
  return { encode(answer) }
end

function verbs.peek(state, most)
  tidy()
  if state == 'waiting' then return records(line(most)) end
  if state == 'running' then return records(call('ZRANGE', RUNNING, 0, math.max(most, BULK) - 1)) end
  return records(call('ZREVRANGE', PREFIX .. state, 0, most - 1))
end

function verbs.show(id, keep)
  tidy()
  if keep then awaited(id) end
  return records({ id })
end

function verbs.declare(settings)
  call('HSET', CONTROL, 'settings', settings)
  for _, text in ipairs(call('ZRANGE', PARKED, 0, -1)) do -- more of a group may run now, perhaps
    local item = load((of_member(text)))
    if item then unpark(item.group) end
  end
  wakes(0)
  return { encode(true) }
end

function verbs.declared()
  return { encode(true), call('HGET', CONTROL, 'settings') or '' }
end

-- ---- what was asked ----

local answers = {}
for at, ask in ipairs(asked) do
  answers[at] = verbs[ask[1]](unpack(ask, 2, 7))
end

-- There was nothing, perhaps since somebody has removed it all: who waits for news would wait for ever.
if new then tell('new') end
if control.need > 0 and limits.size - waiting() >= control.need then
  control.need = 0
  tell('room')
end
if control.hungry and wake_now then
  tell('work', 0)
  control.hungry = false
elseif control.hungry and wake and (control.alarm <= NOW or NOW + wake < control.alarm) then
  tell('work', wake)
  control.alarm = NOW + wake
end
if #over > 0 then tell('ended', over) end
for _, text in ipairs(told) do call('PUBLISH', NEWS, text) end

local changed = {}
for name, value in pairs(control) do
  if value ~= before[name] then
    changed[#changed + 1] = name
    changed[#changed + 1] = type(value) == 'boolean' and (value and '1' or '0') or string.format('%.17g', value)
  end
end
if #changed > 0 then call('HSET', CONTROL, unpack(changed)) end
return answers
