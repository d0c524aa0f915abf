"""The one exception that a command turns into a single line and exit code 2."""


class UserError(Exception):
    """Something the user can mend: its text names what was given, why it fails and what is allowed.

    Everything else that is raised is a defect of ours and keeps its traceback.
    """
