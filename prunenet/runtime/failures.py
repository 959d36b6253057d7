"""How a process of a job ends because of another one; nothing here imports torch."""


class PeerFailed(RuntimeError):
    """Another process of the job has ended too early; the message is one sentence."""


class Followed(Exception):
    """This process ends because another one failed, which has said why."""
