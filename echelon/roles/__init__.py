"""Entry points of the processes of a run; each parses its arguments before it imports anything heavy."""
