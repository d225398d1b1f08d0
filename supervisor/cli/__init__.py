"""The `supervisor` command.

quick       plain command lines, parsed from the table of verbs without click: what people type a hundred times a day
commands    every command line, with help, completion and did-you-mean: click
act         one verb carried out: ask, show, exit code
render      rows, trees, events and times for people
author      check, init, explain, schema: the commands about the file (they load the config machinery)
"""
