"""The control socket: what may be asked (`verbs`), who answers (`server`), and who asks (`client`, `aclient`, the CLI)."""
