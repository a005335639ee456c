"""Networks without numbers are built beside others that are."""

from threading import Thread

import torch
from torch import nn

from regrow.nets.language import load_skeleton


def test_parameters_that_another_thread_makes_meanwhile_stay(folder):
    layers, threads = [], []

    def empty(parameter):
        if not threads:
            threads.append(Thread(target=lambda: layers.append(nn.Linear(2, 3))))
            threads[0].start()
            threads[0].join()
        return nn.Parameter(parameter.to("meta"))

    loaded = load_skeleton(folder, name="tiny", dtype=torch.float32, stored=torch.float32, empty=empty)
    assert all(parameter.is_meta for parameter in loaded.model.parameters())
    assert not any(parameter.is_meta for parameter in layers[0].parameters())
