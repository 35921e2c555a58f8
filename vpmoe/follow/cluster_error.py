"""What a person is told when the cluster does not give what a command needs."""


class ClusterError(Exception):
    """One line that says what is missing, and the remedy."""

    def __init__(self, message: str, *, passing: bool = False, forbidden: bool = False) -> None:
        """`passing`: the same request may succeed a moment later. `forbidden`: the user lacks a right."""
        super().__init__(message)
        self.passing, self.forbidden = passing, forbidden
