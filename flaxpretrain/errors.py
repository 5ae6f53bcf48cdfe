"""What a program answers to a user's mistake: one clear line."""


class UserError(Exception):
    """A mistake that the user can mend: the message names the file, field or flag and what to do.

    Programs print the message as one line and exit with code 2 (`flaxpretrain.program`).
    """
