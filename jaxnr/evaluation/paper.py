"""What the paper measured (arXiv 2602.15005): its tables, and of its figures the values read off them."""

from __future__ import annotations

OFFLINE = {
    "gru": (0.144, 0.189, 0.129, 0.159, 0.117),
    "sasrec": (0.158, 0.206, 0.141, 0.173, 0.129),
    "nrhub": (0.162, 0.212, 0.145, 0.178, 0.133),
    "pinsage": (0.168, 0.220, 0.149, 0.184, 0.138),
    "hstu": (0.216, 0.250, 0.194, 0.228, 0.184),
    "prompt_only": (0.153, 0.194, 0.139, 0.188, 0.147),
    "teacher": (0.257, 0.271, 0.209, 0.241, 0.199),
    "student_on_policy": (0.233, 0.261, 0.196, 0.235, 0.180),
}
"""Recall@5, Recall@10, NDCG@5, NDCG@10, MRR."""

# Below: Recall@10, NDCG@10.
DISTILLATION = {
    "teacher": (0.271, 0.241),
    "student_on_policy": (0.261, 0.235),
    "student_supervised": (0.245, 0.207),
    "student_untrained": (0.187, 0.179),
}
REWARDS = {
    "full": (0.271, 0.241),
    "align": (0.162, 0.141),
    "coverage": (0.115, 0.093),
    "specificity": (0.196, 0.184),
    "diversity": (0.179, 0.144),
    "structure": (0.193, 0.184),
}
"""With all rewards, and without each."""
CAPACITY = {
    "0.5B": (0.187, 0.179),
    "1.5B": (0.193, 0.186),
    "3B": (0.194, 0.189),
    "7B": (0.201, 0.196),
    "14B": (0.238, 0.216),
    "32B": (0.257, 0.241),
}
SAMPLING = {
    1: (0.271, 0.241),
    2: (0.294, 0.267),
    4: (0.301, 0.274),
    8: (0.305, 0.277),
    16: (0.307, 0.279),
    32: (0.310, 0.281),
}
"""By N, the lists whose best is taken."""

USERS_PER_SECOND = {"teacher": 2.0, "student": 67.0}
SPEED_RATIO = 30.0
"""By how much the student is at least faster, in the paper's words."""
