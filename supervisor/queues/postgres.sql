-- Queues in a PostgreSQL (13 or newer): the tables, and the functions that do everything that is done to them.
--
-- Everything happens in functions, so that an operation is one round trip, no lock outlives it, and an application puts items
-- by the same rules as a daemon. Moments are Unix time by the server's clock. What others should know is told on a channel
-- for each queue: work, room, paused, resumed, and with a JSON array: ended ["ID", ...], cancel and lost ["ID:TOKEN", ...].
--
-- Plans are made while the tables are empty, and kept: so functions are in PL/pgSQL (one in SQL that is not inlined is planned
-- anew at each call), and each statement must leave the planner no choice. Rows are looked for by
-- an index that has the order that is asked for, or by queue and id with no word of the state (there are indexes for that);
-- then they are changed by their place, `ctid`, which a lock keeps.

CREATE SCHEMA IF NOT EXISTS supervisor;
CREATE TABLE supervisor.version (number int NOT NULL);
INSERT INTO supervisor.version VALUES (1);

CREATE TABLE supervisor.queues (
  name text PRIMARY KEY,
  settings json NOT NULL,
  declared boolean NOT NULL DEFAULT false, -- false: whoever came first has made it, and put what it believes
  size bigint NOT NULL,
  lease float8 NOT NULL,
  priorities text[] NOT NULL,
  concurrency int,
  per_key int NOT NULL,
  rate float8,
  keep_results float8 NOT NULL,
  expire float8,
  on_conflict text, -- null: keys mean nothing
  key_for float8, -- null: until the item has ended, or with key_queued until it is claimed
  key_queued boolean NOT NULL DEFAULT false,
  group_by text,
  paused boolean NOT NULL DEFAULT false,
  room_wanted boolean NOT NULL DEFAULT false, -- somebody waits for room
  expired bigint NOT NULL DEFAULT 0, -- so many, of which no claim has told yet
  rate_since float8 NOT NULL DEFAULT 0 -- since when tokens are saved up
);

CREATE TABLE supervisor.items (
  seq bigserial NOT NULL,
  queue text NOT NULL,
  id text NOT NULL CHECK (octet_length(id) <= 1000), -- notifications are short
  state text NOT NULL DEFAULT 'waiting',
  payload text NOT NULL,
  priority int NOT NULL DEFAULT 0,
  attempts int NOT NULL DEFAULT 0,
  token bigint NOT NULL DEFAULT 0,
  put_at float8 NOT NULL,
  ready_at float8 NOT NULL,
  expires_at float8,
  started_at float8,
  ended_at float8,
  forget_at float8, -- when one that has ended is kept no longer
  lease_until float8,
  owner text,
  key text,
  in_group text,
  parked boolean NOT NULL DEFAULT false, -- it waits, and was passed over since its group was full
  keep boolean NOT NULL DEFAULT false,
  cancelling boolean NOT NULL DEFAULT false,
  result text,
  error text,
  traceback text,
  done float8,
  total float8,
  PRIMARY KEY (queue, id)
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.05);

CREATE INDEX items_waiting ON supervisor.items (queue, priority, ready_at, seq) WHERE state = 'waiting' AND NOT parked;
CREATE INDEX items_parked ON supervisor.items (queue, in_group, priority, ready_at, seq) WHERE state = 'waiting' AND parked;
CREATE INDEX items_expiring ON supervisor.items (queue, expires_at) WHERE state = 'waiting' AND expires_at IS NOT NULL;
CREATE INDEX items_running ON supervisor.items (queue, lease_until) WHERE state = 'running';
CREATE INDEX items_at_work ON supervisor.items (queue, in_group) WHERE state = 'running' AND in_group IS NOT NULL;
CREATE INDEX items_ended ON supervisor.items (queue, state, ended_at) WHERE ended_at IS NOT NULL;
CREATE INDEX items_over ON supervisor.items (queue, forget_at) WHERE forget_at IS NOT NULL;

-- Keys that are taken. The primary key is what lets only one of two that come at once have it.
CREATE TABLE supervisor.keys (
  queue text NOT NULL,
  key uuid NOT NULL, -- MD5 of the key, which may be long
  id text NOT NULL,
  until float8, -- null: see queues.key_for
  PRIMARY KEY (queue, key)
);
CREATE INDEX keys_id ON supervisor.keys (queue, id);

-- How many wait, as a sum. Rows are only added, so that nobody waits for an application that has put something and is not
-- at its end yet; `tidy` sums up.
CREATE TABLE supervisor.tally (queue text NOT NULL, n bigint NOT NULL);
CREATE INDEX tally_queue ON supervisor.tally (queue);

CREATE FUNCTION supervisor.now() RETURNS float8 LANGUAGE sql VOLATILE AS
  $$ SELECT extract(epoch FROM clock_timestamp())::float8 $$;

CREATE FUNCTION supervisor.channel(q text) RETURNS text LANGUAGE sql IMMUTABLE AS
  $$ SELECT 'supervisor_' || md5(q) $$;

CREATE FUNCTION supervisor.tell(q text, what text) RETURNS void LANGUAGE sql AS
  $$ SELECT pg_notify(supervisor.channel(q), what) $$;

-- Tell of some items; a notification may have 8000 bytes.
CREATE FUNCTION supervisor.tell_of(q text, what text, ids text[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  line text := '';
  each text;
BEGIN
  FOREACH each IN ARRAY ids LOOP
    each := to_json(each);
    IF octet_length(line) + octet_length(each) > 7500 THEN
      PERFORM supervisor.tell(q, what || ' [' || line || ']');
      line := '';
    END IF;
    line := line || CASE line WHEN '' THEN '' ELSE ',' END || each;
  END LOOP;
  PERFORM supervisor.tell(q, what || ' [' || line || ']');
END $$;

CREATE FUNCTION supervisor.waiting(q text) RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
  RETURN (SELECT coalesce(sum(n), 0)::bigint FROM supervisor.tally WHERE queue = q);
END $$;

-- So many more wait, or fewer: then who wants room is told. Who makes room holds the lock together with others that do, who
-- wants it (`want_room`) alone: it sees all that was made before, and what is made later is told.
CREATE FUNCTION supervisor.count(q text, more bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF more <> 0 THEN
    INSERT INTO supervisor.tally VALUES (q, more);
  END IF;
  IF more < 0 THEN
    PERFORM pg_advisory_xact_lock_shared(hashtextextended('supervisor room ' || q, 0));
    IF (SELECT room_wanted FROM supervisor.queues WHERE name = q) THEN
      UPDATE supervisor.queues SET room_wanted = false WHERE name = q;
      PERFORM supervisor.tell(q, 'room');
    END IF;
  END IF;
END $$;

-- In how many seconds there may be room for so many: 0: now; else 'room' is told when there is sooner; null: only then.
CREATE FUNCTION supervisor.want_room(q text, needed bigint) RETURNS float8 LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_advisory_xact_lock(hashtextextended('supervisor room ' || q, 0));
  LOOP
    IF supervisor.waiting(q) + needed <= (SELECT size FROM supervisor.queues WHERE name = q) THEN
      RETURN 0;
    END IF;
    EXIT WHEN supervisor.expire(q) = 0;
  END LOOP;
  UPDATE supervisor.queues SET room_wanted = true WHERE name = q;
  RETURN ( -- in here, since greatest() takes no notice of a null
    SELECT greatest(0.01, expires_at - supervisor.now()) FROM supervisor.items
    WHERE queue = q AND state = 'waiting' AND expires_at IS NOT NULL ORDER BY expires_at LIMIT 1
  );
END $$;

-- Now and then: to look whether it is worth while would cost more than it saves.
CREATE FUNCTION supervisor.sum_up(q text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF random() < 0.03 THEN
    WITH gone AS (
      DELETE FROM supervisor.tally
      WHERE ctid = ANY (ARRAY(SELECT ctid FROM supervisor.tally WHERE queue = q FOR UPDATE SKIP LOCKED))
      RETURNING n
    )
    INSERT INTO supervisor.tally SELECT q, sum(n) FROM gone HAVING count(*) > 0;
  END IF;
END $$;

-- ---- what is true of a queue ----

-- Have these settings. Not `declared`: only if there are none.
CREATE FUNCTION supervisor.declare(q text, said json, declared boolean) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  spec json := said -> 'spec';
  key json := nullif(spec -> 'unique' #>> '{}', '')::json;
BEGIN
  IF NOT declared AND EXISTS (SELECT FROM supervisor.queues WHERE name = q) THEN
    RETURN;
  END IF;
  INSERT INTO supervisor.queues AS known (
    name, settings, declared, size, lease, priorities, concurrency, per_key, rate, keep_results, expire, on_conflict,
    key_for, key_queued, group_by
  ) VALUES (
    q, said, declare.declared, (spec ->> 'size')::bigint, (spec ->> 'lease')::float8,
    ARRAY(SELECT json_array_elements_text(spec -> 'priorities')), (spec ->> 'concurrency')::int, (spec ->> 'per_key')::int,
    (spec ->> 'rate')::float8, (spec ->> 'keep_results')::float8, (spec ->> 'expire')::float8,
    key ->> 'on_conflict',
    CASE WHEN key ->> 'for' NOT IN ('queued', 'running') THEN (key ->> 'for')::float8 END,
    coalesce(key ->> 'for' = 'queued', false), said ->> 'group_by'
  )
  ON CONFLICT (name) DO UPDATE SET
    settings = excluded.settings, declared = true, size = excluded.size, lease = excluded.lease,
    priorities = excluded.priorities, concurrency = excluded.concurrency, per_key = excluded.per_key, rate = excluded.rate,
    keep_results = excluded.keep_results, expire = excluded.expire, on_conflict = excluded.on_conflict,
    key_for = excluded.key_for, key_queued = excluded.key_queued, group_by = excluded.group_by
  WHERE excluded.declared;
  UPDATE supervisor.items SET parked = false WHERE queue = q AND state = 'waiting' AND parked;
  PERFORM supervisor.tell(q, 'work'), supervisor.tell(q, 'room'); -- there may be new limits
END $$;

CREATE FUNCTION supervisor.pause(q text, wanted boolean) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  UPDATE supervisor.queues SET paused = wanted WHERE name = q AND paused <> wanted;
  IF FOUND THEN
    PERFORM supervisor.tell(q, CASE WHEN wanted THEN 'paused' ELSE 'resumed' END), supervisor.tell(q, 'work');
  END IF;
END $$;

-- ---- put ----

-- Have a key: 'stored', or 'replaced' (the `old` one that waited is gone), or 'merged' or 'rejected' and who has it.
CREATE FUNCTION supervisor.take_key(
  s supervisor.queues, k text, me text, OUT what text, OUT who text, OUT old supervisor.items
) LANGUAGE plpgsql AS $$
DECLARE
  held supervisor.keys;
  digest uuid := md5(k)::uuid;
  t float8 := supervisor.now();
BEGIN
  what := 'stored';
  who := me;
  LOOP
    INSERT INTO supervisor.keys VALUES (s.name, digest, me, t + s.key_for) ON CONFLICT DO NOTHING;
    EXIT WHEN FOUND;
    SELECT * INTO held FROM supervisor.keys WHERE queue = s.name AND key = digest FOR UPDATE;
    CONTINUE WHEN NOT FOUND; -- given free this moment
    IF held.until IS NULL OR held.until > t THEN
      what := CASE s.on_conflict WHEN 'merge' THEN 'merged' ELSE 'rejected' END;
      who := held.id;
      EXIT WHEN s.on_conflict <> 'replace';
      DELETE FROM supervisor.items WHERE queue = s.name AND id = held.id AND state = 'waiting' RETURNING * INTO old;
      EXIT WHEN NOT FOUND;
      PERFORM supervisor.count(s.name, -1);
      IF old.keep THEN
        PERFORM supervisor.tell_of(s.name, 'ended', ARRAY[held.id]);
      END IF;
      what := 'replaced';
      who := me;
    END IF;
    UPDATE supervisor.keys SET id = me, until = t + s.key_for WHERE queue = s.name AND key = digest;
    EXIT;
  END LOOP;
END $$;

-- Store those whose ids are not known; gives the ids.
CREATE FUNCTION supervisor.store(
  q text, ids text[], payloads text[], priorities int[], delays float8[], ats float8[], expires float8[], keys text[],
  groups text[], keeps boolean[]
) RETURNS text[] LANGUAGE plpgsql AS $$
DECLARE
  t float8 := supervisor.now();
  came text[];
BEGIN
  WITH new AS (
    INSERT INTO supervisor.items (
      queue, id, payload, priority, put_at, ready_at, expires_at, key, in_group, keep
    )
    SELECT q, d.id, d.payload, d.priority, t, d.ready, d.ready + d.expire, d.key, d.in_group, d.keep
    FROM (
      SELECT *, greatest(t + wait, at) AS ready
      FROM unnest(ids, payloads, priorities, delays, ats, expires, keys, groups, keeps) WITH ORDINALITY
        AS each (id, payload, priority, wait, at, expire, key, in_group, keep, n)
    ) AS d
    ORDER BY d.n
    ON CONFLICT DO NOTHING
    RETURNING items.id
  )
  SELECT coalesce(array_agg(id), '{}') INTO came FROM new;
  IF came <> '{}' THEN
    PERFORM supervisor.count(q, cardinality(came)), supervisor.tell(q, 'work');
  END IF;
  RETURN came;
END $$;

-- An item that replaces another stands in line where that stood, unless it is of another priority or for a later time.
CREATE FUNCTION supervisor.stand(q text, me text, old supervisor.items) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  t float8 := supervisor.now();
BEGIN
  UPDATE supervisor.items SET seq = old.seq, ready_at = old.ready_at
  WHERE queue = q AND id = me AND priority = old.priority AND ready_at <= t AND old.ready_at <= t;
END $$;

-- Somebody waits for the end of these items, though nobody did who put them first.
CREATE FUNCTION supervisor.keep(q text, those text[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF those <> '{}' THEN
    UPDATE supervisor.items SET keep = true WHERE queue = q AND id = ANY (those) AND NOT keep;
  END IF;
END $$;

-- Store all, and give a receipt for each; or raise SVQ01, since they do not all fit.
CREATE FUNCTION supervisor.put_all(
  q text, ids text[], payloads text[], priorities int[], delays float8[], ats float8[], expires float8[], keys text[],
  groups text[], keeps boolean[]
) RETURNS TABLE (what text, who text) LANGUAGE plpgsql AS $$
DECLARE
  s supervisor.queues;
  came text[];
  had record;
  more int := 0;
BEGIN
  SELECT * INTO STRICT s FROM supervisor.queues WHERE name = q;
  IF s.on_conflict IS NULL OR array_remove(keys, NULL) = '{}' THEN
    came := supervisor.store(q, ids, payloads, priorities, delays, ats, expires, keys, groups, keeps);
    more := cardinality(came);
    IF more = cardinality(ids) THEN
      RETURN QUERY SELECT 'stored', id FROM unnest(ids) AS id;
    ELSE
      PERFORM supervisor.keep(q, ARRAY(SELECT id FROM unnest(ids, keeps) AS each (id, keep) WHERE keep AND id <> ALL (came)));
      RETURN QUERY
        SELECT CASE WHEN d.nth = 1 AND new.id IS NOT NULL THEN 'stored' ELSE 'known' END, d.id
        FROM (
          SELECT id, n, row_number() OVER (PARTITION BY id ORDER BY n) AS nth FROM unnest(ids) WITH ORDINALITY AS each (id, n)
        ) AS d
        LEFT JOIN unnest(came) AS new (id) USING (id)
        ORDER BY d.n;
    END IF;
  ELSE
    FOR i IN 1 .. cardinality(ids) LOOP -- one after another: the second of a key meets the first
      what := 'stored';
      who := ids[i];
      IF EXISTS (SELECT FROM supervisor.items WHERE queue = q AND id = ids[i]) THEN
        what := 'known';
      ELSIF keys[i] IS NOT NULL THEN
        SELECT * INTO had FROM supervisor.take_key(s, keys[i], ids[i]);
        what := had.what;
        who := had.who;
      END IF;
      IF what IN ('stored', 'replaced') THEN
        came := supervisor.store(
          q, ids[i : i], payloads[i : i], priorities[i : i], delays[i : i], ats[i : i], expires[i : i], keys[i : i],
          groups[i : i], keeps[i : i]
        );
        IF came = '{}' THEN
          what := 'known';
        ELSIF what = 'stored' THEN
          more := more + 1;
        ELSE
          PERFORM supervisor.stand(q, ids[i], had.old);
        END IF;
      END IF;
      IF what IN ('known', 'merged') AND keeps[i] THEN
        PERFORM supervisor.keep(q, ARRAY[who]);
      END IF;
      RETURN NEXT;
    END LOOP;
  END IF;
  IF more > 0 AND supervisor.waiting(q) > s.size THEN
    LOOP
      EXIT WHEN supervisor.expire(q) = 0 OR supervisor.waiting(q) <= s.size;
    END LOOP;
  END IF;
  IF more > 0 AND supervisor.waiting(q) > s.size THEN
    RAISE EXCEPTION 'the queue "%" is full: % items may wait', q, s.size USING ERRCODE = 'SVQ01';
  END IF;
END $$;

-- `put_all` for daemons: where there is no room, the one receipt says 'full'.
CREATE FUNCTION supervisor.offer(
  q text, ids text[], payloads text[], priorities int[], delays float8[], ats float8[], expires float8[], keys text[],
  groups text[], keeps boolean[]
) RETURNS TABLE (what text, who text) LANGUAGE plpgsql AS $$
BEGIN
  PERFORM supervisor.sum_up(q);
  RETURN QUERY
    SELECT * FROM supervisor.put_all(q, ids, payloads, priorities, delays, ats, expires, keys, groups, keeps);
EXCEPTION
  WHEN SQLSTATE 'SVQ01' THEN
    RETURN QUERY SELECT 'full', '';
END $$;

-- JSON as a producer in Python writes it to compare it: no spaces, keys in order; a long one by its hash.
CREATE FUNCTION supervisor.canonical(value jsonb) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
  IF jsonb_typeof(value) = 'object' THEN
    RETURN '{' || coalesce((
      SELECT string_agg(to_json(e.key) || ':' || supervisor.canonical(e.value), ',' ORDER BY e.key COLLATE "C")
      FROM jsonb_each(value) AS e
    ), '') || '}';
  ELSIF jsonb_typeof(value) = 'array' THEN
    RETURN '[' || coalesce((
      SELECT string_agg(supervisor.canonical(e.value), ',' ORDER BY e.n)
      FROM jsonb_array_elements(value) WITH ORDINALITY AS e (value, n)
    ), '') || ']';
  END IF;
  RETURN value;
END $$;

CREATE FUNCTION supervisor.shortened(word text) RETURNS text LANGUAGE sql IMMUTABLE AS $$
  SELECT CASE WHEN length(word) <= 128 THEN word ELSE encode(sha256(convert_to(word, 'UTF8')), 'hex') END
$$;

-- A field of an item. Raises where there is none.
CREATE FUNCTION supervisor.field(payload jsonb, name text) RETURNS jsonb LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
  IF jsonb_typeof(payload) <> 'object' OR NOT payload ? name THEN
    RAISE EXCEPTION 'expected an object with a field "%", which the queue compares', name USING ERRCODE = '22023';
  END IF;
  RETURN payload -> name;
END $$;

-- For applications: put an item, in the transaction in which this is called. Gives its id; or, where the queue is `unique` and
-- its key is taken, the id of the item that it is one with (`merge`), or null (`reject`). Raises where the queue is full (SVQ01),
-- is not known, has no such priority, or compares a field that the payload does not have.
CREATE FUNCTION supervisor.put(
  queue text, payload jsonb, id text DEFAULT NULL, priority text DEFAULT NULL, delay interval DEFAULT '0',
  at timestamptz DEFAULT NULL, expire interval DEFAULT NULL, keep boolean DEFAULT false
) RETURNS text LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  s supervisor.queues;
  level int;
  fields text[];
  key text;
  in_group jsonb;
  receipt record;
BEGIN
  SELECT * INTO s FROM supervisor.queues AS q WHERE q.name = put.queue AND q.declared;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'no daemon has handled a queue "%" in this database', put.queue USING ERRCODE = '22023';
  END IF;
  level := coalesce(array_position(s.priorities, put.priority), CASE WHEN put.priority IS NULL THEN cardinality(s.priorities) / 2 + 1 END);
  IF level IS NULL THEN
    RAISE EXCEPTION 'no priority "%"; there are %', put.priority, array_to_string(s.priorities, ', ') USING ERRCODE = '22023';
  END IF;
  IF s.on_conflict IS NOT NULL THEN
    fields := ARRAY(SELECT json_array_elements_text(s.settings -> 'spec' -> 'unique' -> 'by'));
    key := supervisor.shortened(supervisor.canonical(CASE WHEN fields = '{}' THEN put.payload ELSE to_jsonb(
      ARRAY(SELECT supervisor.field(put.payload, name) FROM unnest(fields) WITH ORDINALITY AS each (name, n) ORDER BY n)
    ) END));
  END IF;
  IF s.group_by IS NOT NULL THEN
    in_group := nullif(supervisor.field(put.payload, s.group_by), 'null');
  END IF;
  SELECT * INTO receipt FROM supervisor.put_all(
    s.name, ARRAY[coalesce(put.id, supervisor.new_id())], ARRAY[put.payload::text], ARRAY[level - 1],
    ARRAY[extract(epoch FROM put.delay)::float8], ARRAY[extract(epoch FROM put.at)::float8],
    ARRAY[coalesce(extract(epoch FROM put.expire)::float8, s.expire)], ARRAY[key],
    ARRAY[supervisor.shortened(CASE jsonb_typeof(in_group) WHEN 'string' THEN in_group #>> '{}' ELSE supervisor.canonical(in_group) END)],
    ARRAY[put.keep]
  );
  RETURN CASE WHEN receipt.what <> 'rejected' THEN receipt.who END;
END $$;

-- As a producer in Python makes them: later ones sort after earlier ones.
CREATE FUNCTION supervisor.new_id() RETURNS text LANGUAGE plpgsql AS $$
DECLARE
  digits CONSTANT text := '0123456789abcdefghjkmnpqrstvwxyz';
  moment bigint := supervisor.now() * 1000;
  chance bytea := sha256(uuid_send(gen_random_uuid())); -- some bits of a UUID are not random
  id text := '';
BEGIN
  FOR place IN REVERSE 9 .. 0 LOOP
    id := id || substr(digits, (moment >> 5 * place & 31)::int + 1, 1);
  END LOOP;
  FOR byte IN 0 .. 15 LOOP -- of 256 values, 32 digits: all alike
    id := id || substr(digits, get_byte(chance, byte) % 32 + 1, 1);
  END LOOP;
  RETURN id;
END $$;

-- ---- claim ----

-- Items have ended: their keys are free, and who waits for them is told.
CREATE FUNCTION supervisor.over(q text, keyed text[], kept text[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF keyed IS NOT NULL THEN
    DELETE FROM supervisor.keys WHERE queue = q AND id = ANY (keyed) AND until IS NULL;
  END IF;
  IF kept IS NOT NULL THEN
    PERFORM supervisor.tell_of(q, 'ended', kept);
  END IF;
END $$;

-- Up to 1000 of what has waited for too long has expired; gives how many.
CREATE FUNCTION supervisor.expire(q text) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
  t float8 := supervisor.now();
  late bigint;
  keyed text[];
  kept text[];
  grouped boolean;
BEGIN
  WITH done AS (
    UPDATE supervisor.items
    SET state = 'expired', parked = false, ended_at = t,
      forget_at = t + (SELECT keep_results FROM supervisor.queues WHERE name = q)
    WHERE ctid = ANY (ARRAY(
      SELECT ctid FROM supervisor.items WHERE queue = q AND state = 'waiting' AND expires_at <= t
      ORDER BY expires_at LIMIT 1000 FOR UPDATE SKIP LOCKED
    ))
    RETURNING id, key, keep, in_group
  )
  SELECT
    count(*), array_agg(id) FILTER (WHERE key IS NOT NULL), array_agg(id) FILTER (WHERE keep),
    coalesce(bool_or(in_group IS NOT NULL), false)
  INTO late, keyed, kept, grouped FROM done;
  IF late > 0 THEN
    UPDATE supervisor.queues SET expired = expired + late WHERE name = q;
    PERFORM supervisor.over(q, keyed, kept), supervisor.count(q, -late);
  END IF;
  IF grouped THEN -- the next one of the group may be parked
    PERFORM supervisor.tell(q, 'work');
  END IF;
  RETURN late;
END $$;

-- Up to `most` items whose lease has run out wait again.
CREATE FUNCTION supervisor.reclaim(q text, most int, why text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  t float8 := supervisor.now();
  again bigint;
  keyed text[];
  kept text[];
  lost text[];
BEGIN
  WITH done AS (
    UPDATE supervisor.items SET
      state = CASE WHEN cancelling THEN 'cancelled' ELSE 'waiting' END,
      ended_at = CASE WHEN cancelling THEN t END,
      forget_at = CASE WHEN cancelling THEN t + (SELECT keep_results FROM supervisor.queues WHERE name = q) END,
      expires_at = t + (expires_at - ready_at), ready_at = t, lease_until = NULL, cancelling = false,
      error = why, traceback = NULL
    WHERE ctid = ANY (ARRAY(
      SELECT ctid FROM supervisor.items WHERE queue = q AND state = 'running' AND lease_until <= t
      ORDER BY lease_until LIMIT most FOR UPDATE SKIP LOCKED
    ))
    RETURNING id, token, state, key, keep
  )
  SELECT
    count(*) FILTER (WHERE state = 'waiting'), array_agg(id) FILTER (WHERE state = 'cancelled' AND key IS NOT NULL),
    array_agg(id) FILTER (WHERE state = 'cancelled' AND keep), array_agg(id || ':' || token)
  INTO again, keyed, kept, lost FROM done;
  IF lost IS NOT NULL THEN
    PERFORM supervisor.over(q, keyed, kept), supervisor.count(q, again), supervisor.tell_of(q, 'lost', lost),
      supervisor.tell(q, 'work');
  END IF;
END $$;

-- What time does: what is not kept any longer is gone, what has waited for too long has expired, and up to `most` items whose
-- lease has run out wait again. Mostly there is nothing of it, so this is asked first.
CREATE FUNCTION supervisor.tidy(q text, most int, why text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  t float8 := supervisor.now();
  old boolean;
  late boolean;
  lost boolean;
BEGIN
  SELECT
    (SELECT forget_at <= t FROM supervisor.items WHERE queue = q AND forget_at IS NOT NULL ORDER BY forget_at LIMIT 1),
    (SELECT expires_at <= t FROM supervisor.items
      WHERE queue = q AND state = 'waiting' AND expires_at IS NOT NULL ORDER BY expires_at LIMIT 1),
    (SELECT lease_until <= t FROM supervisor.items WHERE queue = q AND state = 'running' ORDER BY lease_until LIMIT 1)
  INTO old, late, lost;
  IF old THEN
    DELETE FROM supervisor.items WHERE ctid = ANY (ARRAY(
      SELECT ctid FROM supervisor.items WHERE queue = q AND forget_at <= t ORDER BY forget_at LIMIT 1000 FOR UPDATE SKIP LOCKED
    ));
  END IF;
  IF late THEN
    PERFORM supervisor.expire(q);
  END IF;
  IF lost THEN
    PERFORM supervisor.reclaim(q, most, why);
  END IF;
END $$;

-- How many a rate lets through now (null: there is none): what a second brings is saved up, one at least.
CREATE FUNCTION supervisor.tokens_left(s supervisor.queues) RETURNS float8 LANGUAGE plpgsql AS $$
BEGIN
  RETURN CASE WHEN s.rate IS NOT NULL THEN
    least(greatest(1, s.rate), (supervisor.now() - s.rate_since) * s.rate) + 1e-6 -- a millionth, for what floats lose
  END;
END $$;

-- The priorities of what waits, those of `first` first.
CREATE FUNCTION supervisor.levels(q text, first int[]) RETURNS int[] LANGUAGE plpgsql AS $$
DECLARE
  found int[] := first;
  level int;
BEGIN
  LOOP
    level := (
      SELECT priority FROM supervisor.items
      WHERE queue = q AND state = 'waiting' AND NOT parked AND priority > coalesce(level, -2147483648)
      ORDER BY priority LIMIT 1
    );
    EXIT WHEN level IS NULL;
    IF level <> ALL (found) THEN
      found := found || level;
    END IF;
  END LOOP;
  RETURN found;
END $$;

-- How many of a group run.
CREATE FUNCTION supervisor.at_work(q text, which text) RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
  RETURN (SELECT count(*) FROM supervisor.items WHERE queue = q AND state = 'running' AND in_group = which);
END $$;

-- What waits of a group that is full is parked, so that a claim passes over it once, not each time; of one that is full no
-- longer, so many stand in line again as may run. Only who has the lock of `pick` parks or does this.
CREATE FUNCTION supervisor.unpark(s supervisor.queues) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  which text := (
    SELECT in_group FROM supervisor.items WHERE queue = s.name AND state = 'waiting' AND parked ORDER BY in_group LIMIT 1
  );
BEGIN
  WHILE which IS NOT NULL LOOP
    UPDATE supervisor.items SET parked = false WHERE ctid = ANY (ARRAY(
      SELECT ctid FROM supervisor.items WHERE queue = s.name AND state = 'waiting' AND parked AND in_group = which
      ORDER BY priority, ready_at, seq LIMIT greatest(0, s.per_key - supervisor.at_work(s.name, which))
      FOR UPDATE SKIP LOCKED
    ));
    which := (
      SELECT in_group FROM supervisor.items
      WHERE queue = s.name AND state = 'waiting' AND parked AND in_group > which ORDER BY in_group LIMIT 1
    );
  END LOOP;
END $$;

-- The places of up to `most` items that may run now, in their order, locked. Where there are limits, nobody else picks before
-- this transaction ends.
CREATE FUNCTION supervisor.pick(s supervisor.queues, most int, first int[]) RETURNS tid[] LANGUAGE plpgsql AS $$
DECLARE
  t float8 := supervisor.now();
  places tid[] := '{}';
  aside tid[] := '{}';
  room jsonb := '{}'; -- by group, how many more may run
  level int;
  left_here int;
  each record;
BEGIN
  IF s.paused THEN
    RETURN places;
  END IF;
  IF s.concurrency IS NULL AND s.rate IS NULL AND s.group_by IS NULL THEN
    FOREACH level IN ARRAY supervisor.levels(s.name, first) LOOP
      places := places || ARRAY(
        SELECT ctid FROM supervisor.items
        WHERE queue = s.name AND state = 'waiting' AND NOT parked AND priority = level AND ready_at <= t
        ORDER BY ready_at, seq LIMIT most - cardinality(places) FOR UPDATE SKIP LOCKED
      );
    END LOOP;
    RETURN places;
  END IF;
  PERFORM pg_advisory_xact_lock(hashtextextended('supervisor claim ' || s.name, 0));
  SELECT * INTO s FROM supervisor.queues WHERE name = s.name;
  most := least(most, floor(supervisor.tokens_left(s)));
  IF s.concurrency IS NOT NULL THEN
    most := least(most, s.concurrency - (SELECT count(*) FROM supervisor.items WHERE queue = s.name AND state = 'running'));
  END IF;
  IF most <= 0 THEN
    RETURN places;
  END IF;
  IF s.group_by IS NOT NULL THEN
    PERFORM supervisor.unpark(s);
  END IF;
  FOREACH level IN ARRAY supervisor.levels(s.name, first) LOOP
    EXIT WHEN cardinality(places) >= most;
    FOR each IN
      SELECT ctid AS place, in_group FROM supervisor.items
      WHERE queue = s.name AND state = 'waiting' AND NOT parked AND priority = level AND ready_at <= t
      ORDER BY ready_at, seq FOR UPDATE SKIP LOCKED
    LOOP
      IF s.group_by IS NOT NULL AND each.in_group IS NOT NULL THEN
        left_here := coalesce((room ->> each.in_group)::int, s.per_key - supervisor.at_work(s.name, each.in_group));
        room := room || jsonb_build_object(each.in_group, greatest(0, left_here - 1));
        IF left_here <= 0 THEN
          aside := aside || each.place;
          EXIT WHEN cardinality(aside) >= 5000; -- the next claim goes on
          CONTINUE;
        END IF;
      END IF;
      places := places || each.place;
      EXIT WHEN cardinality(places) >= most;
    END LOOP;
    EXIT WHEN cardinality(aside) >= 5000;
  END LOOP;
  UPDATE supervisor.items SET parked = true WHERE ctid = ANY (aside);
  RETURN places;
END $$;

-- Of places, the first ones, whose items are not too much to send in one go; one at least.
CREATE FUNCTION supervisor.trimmed(places tid[]) RETURNS tid[] LANGUAGE plpgsql AS $$
BEGIN
  RETURN ARRAY(
    SELECT place FROM (
      SELECT place, n, sum(size) OVER (ORDER BY n) - size AS before
      FROM unnest(places) WITH ORDINALITY AS each (place, n),
        LATERAL (SELECT octet_length(payload) AS size FROM supervisor.items WHERE ctid = each.place LIMIT 1) AS sized
    ) AS sums
    WHERE before < 4000000 ORDER BY n
  );
END $$;

-- Claim up to `most` items: a row for each that runs, and with `dead` for each of which no attempt of the `allowed` is left. The
-- last row is none: it says how many have `expired` since the last one that did, and in how many seconds a claim may bring more
-- (`due`; null: not before something happens). The time is in a token, so that who had an item has no token of one that is put
-- under the same id when that is forgotten.
CREATE FUNCTION supervisor.claim(
  q text, most int, who text, allowed int, first int[], why_lost text, why_dead text
) RETURNS TABLE (
  id text, token bigint, payload text, attempts int, priority int, in_group text, put_at float8, ready_at float8, dead json,
  expired bigint, due float8
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
  s supervisor.queues;
  places tid[];
  picked int;
  t float8;
  begun bigint;
  late supervisor.items[] := '{}';
BEGIN
  PERFORM supervisor.tidy(q, most, why_lost);
  SELECT * INTO STRICT s FROM supervisor.queues WHERE name = q;
  places := supervisor.pick(s, most, first);
  picked := cardinality(places);
  IF picked > 1 THEN
    places := supervisor.trimmed(places);
  END IF;
  IF picked > 0 THEN
    t := supervisor.now();
    IF EXISTS (SELECT FROM supervisor.items WHERE ctid = ANY (places) AND attempts >= allowed) THEN
      WITH done AS (
        UPDATE supervisor.items AS i SET state = 'dead', ended_at = t, error = coalesce(error, why_dead)
        WHERE ctid = ANY (places) AND attempts >= allowed RETURNING i
      )
      SELECT array_agg(i) INTO late FROM done;
      PERFORM supervisor.over(
        q, array_agg(i.id) FILTER (WHERE i.key IS NOT NULL), array_agg(i.id) FILTER (WHERE i.keep)
      ) FROM unnest(late) AS i;
      RETURN QUERY SELECT
        i.id, i.token, NULL, i.attempts, i.priority, i.in_group, i.put_at, i.ready_at, row_to_json(i), NULL::bigint,
        NULL::float8
      FROM unnest(late) AS i;
    END IF;
    IF s.key_queued THEN
      DELETE FROM supervisor.keys
      WHERE queue = q AND id IN (SELECT id FROM supervisor.items WHERE ctid = ANY (places)) AND until IS NULL;
    END IF;
    RETURN QUERY
      WITH done AS (
        UPDATE supervisor.items AS i SET
          state = 'running', attempts = attempts + 1, token = greatest(token + 1, (t * 1000000)::bigint), started_at = t,
          owner = who, lease_until = t + s.lease, done = NULL, total = NULL
        WHERE ctid = ANY (places) -- those that are dead are at another place by now
        RETURNING id, token, payload, attempts, priority, in_group, put_at, ready_at, seq
      )
      SELECT
        d.id, d.token, d.payload, d.attempts, d.priority, d.in_group, d.put_at, d.ready_at, NULL::json, NULL::bigint,
        NULL::float8
      FROM done AS d ORDER BY array_position(first, d.priority) NULLS LAST, d.priority, d.ready_at, d.seq;
    GET DIAGNOSTICS begun = ROW_COUNT;
    IF s.rate IS NOT NULL THEN
      UPDATE supervisor.queues SET rate_since = greatest(rate_since, t - greatest(1, rate) / rate) + begun / rate
      WHERE name = q;
    END IF;
    PERFORM supervisor.count(q, -(begun + cardinality(late))), supervisor.sum_up(q);
  END IF;
  IF s.expired > 0 THEN
    UPDATE supervisor.queues AS it SET expired = it.expired - s.expired WHERE name = q;
  END IF;
  id := NULL;
  expired := s.expired;
  due := CASE
    WHEN picked > cardinality(places) OR late <> '{}' THEN 0
    WHEN picked >= most THEN supervisor.due(q)
    ELSE supervisor.next_moment(q)
  END;
  RETURN NEXT;
END $$;

-- In how many seconds a claim may bring something; 0: now; null: not before something happens.
CREATE FUNCTION supervisor.due(q text) RETURNS float8 LANGUAGE plpgsql AS $$
DECLARE
  s supervisor.queues;
  level int;
BEGIN
  SELECT * INTO STRICT s FROM supervisor.queues WHERE name = q;
  IF s.concurrency IS NOT NULL OR s.rate IS NOT NULL OR s.group_by IS NOT NULL THEN
    RETURN CASE WHEN supervisor.pick(s, 1, '{}') = '{}' THEN supervisor.next_moment(q) ELSE 0 END;
  END IF;
  FOREACH level IN ARRAY CASE WHEN s.paused THEN '{}' ELSE supervisor.levels(q, '{}') END LOOP
    IF EXISTS ( -- without a lock: others would pass over what nobody takes
      SELECT FROM supervisor.items
      WHERE queue = q AND state = 'waiting' AND NOT parked AND priority = level AND ready_at <= supervisor.now()
      ORDER BY ready_at LIMIT 1
    ) THEN
      RETURN 0;
    END IF;
  END LOOP;
  RETURN supervisor.next_moment(q);
END $$;

-- The same, where a claim brings nothing now.
CREATE FUNCTION supervisor.next_moment(q text) RETURNS float8 LANGUAGE plpgsql AS $$
DECLARE
  s supervisor.queues;
  t float8 := supervisor.now();
  level int;
  moment float8;
BEGIN
  SELECT * INTO STRICT s FROM supervisor.queues WHERE name = q;
  SELECT least(
    (SELECT lease_until FROM supervisor.items WHERE queue = q AND state = 'running' ORDER BY lease_until LIMIT 1),
    (SELECT expires_at FROM supervisor.items
      WHERE queue = q AND state = 'waiting' AND expires_at IS NOT NULL ORDER BY expires_at LIMIT 1)
  ) INTO moment;
  FOREACH level IN ARRAY CASE WHEN s.paused THEN '{}' ELSE supervisor.levels(q, '{}') END LOOP
    moment := least(moment, (
      SELECT ready_at FROM supervisor.items
      WHERE queue = q AND state = 'waiting' AND NOT parked AND priority = level AND ready_at > t
      ORDER BY ready_at LIMIT 1
    ));
    IF EXISTS (
      SELECT FROM supervisor.items
      WHERE queue = q AND state = 'waiting' AND NOT parked AND priority = level AND ready_at <= t
      ORDER BY ready_at LIMIT 1
    ) THEN -- either a limit keeps it, or somebody claims it this moment, if that does not fail
      IF s.rate IS NOT NULL THEN
        moment := least(moment, greatest(s.rate_since + 1 / s.rate, t + 0.001));
      ELSIF s.concurrency IS NULL THEN
        moment := least(moment, t + CASE WHEN s.group_by IS NULL THEN 1 ELSE 0.01 END); -- or many are being parked
      END IF;
    END IF;
  END LOOP;
  RETURN CASE WHEN moment IS NOT NULL THEN greatest(0, moment - t) END;
END $$;

-- ---- finish ----

-- What of this is still held so, locked.
CREATE FUNCTION supervisor.held(q text, ids text[], tokens bigint[]) RETURNS TABLE (
  n bigint, place tid, id text, token bigint, cancelling boolean, keep boolean, key text
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
  RETURN QUERY
    SELECT each.n, i.ctid, i.id, i.token, i.cancelling, i.keep, i.key
    FROM unnest(ids, tokens) WITH ORDINALITY AS each (id, token, n), LATERAL (
      SELECT ctid, * FROM supervisor.items WHERE queue = q AND id = each.id AND token = each.token LIMIT 1 FOR UPDATE
    ) AS i
    WHERE i.state = 'running';
END $$;

-- Prolong leases; gives which of these are still held, counted from 1.
CREATE FUNCTION supervisor.renew(q text, ids text[], tokens bigint[]) RETURNS bigint[] LANGUAGE plpgsql AS $$
DECLARE
  places tid[];
  found bigint[];
BEGIN
  SELECT coalesce(array_agg(place), '{}'), coalesce(array_agg(n), '{}') INTO places, found
  FROM supervisor.held(q, ids, tokens);
  UPDATE supervisor.items SET lease_until = supervisor.now() + (SELECT lease FROM supervisor.queues WHERE name = q)
  WHERE ctid = ANY (places);
  RETURN found;
END $$;

-- What became of items; gives which of these were still held, counted from 1.
CREATE FUNCTION supervisor.finish(
  q text, ids text[], tokens bigint[], hows text[], results text[], errors text[], tracebacks text[], delays float8[]
) RETURNS bigint[] LANGUAGE plpgsql AS $$
DECLARE
  s supervisor.queues;
  t float8 := supervisor.now();
  found bigint[] := '{}';
  ended tid[] := '{}';
  gone tid[] := '{}';
  again int := 0;
  keyed text[];
  kept text[];
  each record;
  how text;
BEGIN
  SELECT * INTO STRICT s FROM supervisor.queues WHERE name = q;
  FOR each IN SELECT * FROM supervisor.held(q, ids, tokens) LOOP
    CONTINUE WHEN each.place = ANY (ended); -- said twice
    ended := ended || each.place;
    found := found || each.n;
    how := hows[each.n];
    IF how IN ('retry', 'back') AND NOT each.cancelling THEN
      again := again + 1;
      UPDATE supervisor.items SET
        state = 'waiting', lease_until = NULL,
        attempts = attempts - CASE how WHEN 'back' THEN 1 ELSE 0 END,
        ready_at = CASE how WHEN 'back' THEN ready_at ELSE t + delays[each.n] END,
        expires_at = CASE how WHEN 'back' THEN expires_at ELSE t + delays[each.n] + (expires_at - ready_at) END,
        error = CASE how WHEN 'back' THEN error ELSE errors[each.n] END,
        traceback = CASE how WHEN 'back' THEN traceback ELSE tracebacks[each.n] END
      WHERE ctid = each.place;
      CONTINUE;
    END IF;
    IF how = 'done' AND results[each.n] IS NULL AND NOT each.keep THEN
      gone := gone || each.place;
    ELSE
      UPDATE supervisor.items SET
        state = CASE WHEN how IN ('retry', 'back') THEN 'cancelled' ELSE how END, ended_at = t,
        forget_at = CASE WHEN how <> 'dead' THEN t + s.keep_results END, lease_until = NULL, cancelling = false,
        result = results[each.n], error = errors[each.n], traceback = tracebacks[each.n]
      WHERE ctid = each.place;
    END IF;
    IF each.key IS NOT NULL THEN
      keyed := keyed || each.id;
    END IF;
    IF each.keep THEN
      kept := kept || each.id;
    END IF;
  END LOOP;
  DELETE FROM supervisor.items WHERE ctid = ANY (gone);
  PERFORM supervisor.over(q, keyed, kept), supervisor.count(q, again);
  IF again > 0 OR s.group_by IS NOT NULL OR s.concurrency IS NOT NULL THEN
    PERFORM supervisor.tell(q, 'work');
  END IF;
  RETURN found;
END $$;

-- ---- for people ----

CREATE FUNCTION supervisor.cancel(q text, which text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
  item supervisor.items;
BEGIN
  SELECT * INTO item FROM supervisor.items WHERE queue = q AND id = which FOR UPDATE;
  IF NOT FOUND THEN
    RETURN 'unknown';
  ELSIF item.state = 'waiting' THEN
    UPDATE supervisor.items
    SET state = 'cancelled', parked = false, ended_at = supervisor.now(),
      forget_at = supervisor.now() + (SELECT keep_results FROM supervisor.queues WHERE name = q)
    WHERE queue = q AND id = which;
    PERFORM supervisor.over(q, ARRAY[which], CASE WHEN item.keep THEN ARRAY[which] END), supervisor.count(q, -1);
    IF item.in_group IS NOT NULL THEN -- the next one of the group may be parked
      PERFORM supervisor.tell(q, 'work');
    END IF;
    RETURN 'cancelled';
  ELSIF item.state = 'running' THEN
    UPDATE supervisor.items SET cancelling = true WHERE queue = q AND id = which;
    PERFORM supervisor.tell_of(q, 'cancel', ARRAY[which || ':' || item.token]);
    RETURN 'running';
  END IF;
  RETURN 'ended';
END $$;

-- Up to `most` dead items (of these ids; null: all) wait again, their attempts anew; gives how many.
CREATE FUNCTION supervisor.requeue(q text, wanted text[], most int) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
  t float8 := supervisor.now();
  again bigint;
BEGIN
  UPDATE supervisor.items
  SET state = 'waiting', attempts = 0, expires_at = t + (expires_at - ready_at), ready_at = t, ended_at = NULL
  WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM supervisor.items
    WHERE queue = q AND state = 'dead' AND ended_at IS NOT NULL AND (wanted IS NULL OR id = ANY (wanted))
    ORDER BY ended_at LIMIT most FOR UPDATE SKIP LOCKED
  ));
  GET DIAGNOSTICS again = ROW_COUNT;
  PERFORM supervisor.count(q, again);
  IF again > 0 THEN
    PERFORM supervisor.tell(q, 'work');
  END IF;
  RETURN again;
END $$;

-- Up to `most` items of a state are no more; gives how many.
CREATE FUNCTION supervisor.purge(q text, what text, most int) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
  places tid[];
  gone bigint;
  keyed text[];
  kept text[];
BEGIN
  IF what = 'waiting' THEN
    UPDATE supervisor.items SET parked = false WHERE queue = q AND state = 'waiting' AND parked;
    places := ARRAY(
      SELECT ctid FROM supervisor.items WHERE queue = q AND state = 'waiting' AND NOT parked
      ORDER BY priority, ready_at, seq LIMIT most FOR UPDATE SKIP LOCKED
    );
  ELSE
    places := ARRAY(
      SELECT ctid FROM supervisor.items WHERE queue = q AND state = what AND ended_at IS NOT NULL
      ORDER BY ended_at LIMIT most FOR UPDATE SKIP LOCKED
    );
  END IF;
  WITH done AS (DELETE FROM supervisor.items WHERE ctid = ANY (places) RETURNING id, key, keep)
  SELECT count(*), array_agg(id) FILTER (WHERE key IS NOT NULL), array_agg(id) FILTER (WHERE keep)
  INTO gone, keyed, kept FROM done;
  IF what = 'waiting' THEN
    PERFORM supervisor.over(q, keyed, kept), supervisor.count(q, -gone);
  END IF;
  RETURN gone;
END $$;
