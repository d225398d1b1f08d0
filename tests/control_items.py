"""Functions that handle items, for the tests of verbs."""

import trio


async def resize(item: dict):
    return f"{item['path']} resized"


async def send(item):
    await trio.sleep_forever()
