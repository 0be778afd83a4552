"""One VM under its operator: run states, commands, migrations, endings."""
