"""The outcomes of checking a completion against the Harmony format.

`prompts.completion_validity` decides which one it is.

The names are stored in window files, metrics and evaluations.
"""

VALID = "valid"
"""Any number of analysis messages closed by `<|end|>`, then one final message with text, closed by
`<|return|>`."""
NO_FINAL = "noFinal"
"""No final message that has text."""
UNCLOSED_REASONING = "unclosedReasoning"
"""No final message, and the stop token was sampled inside an analysis message."""
WRONG_ORDER = "wrongOrder"
"""There is a final message with text, and something else is misplaced or does not belong there."""
TRUNCATED = "truncated"
"""It does not end with a stop token."""

VALIDITIES = (VALID, NO_FINAL, UNCLOSED_REASONING, WRONG_ORDER, TRUNCATED)
