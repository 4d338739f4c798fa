"""A model of Transformers whose weights are sharded over two processes: alpha is one of them."""

import copy
import os
import socket

import pytest
import torch

pytest.importorskip("transformers", minversion="5.4")
pytest.importorskip("entmax")

from torch import distributed, multiprocessing, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers_models import make, tokens

from flash_entmax.integrations import transformers as integration

ALPHAS = {"scalar": torch.tensor(1.3), "by head": torch.tensor([1.2, 1.4, 1.6, 1.8])}


def prepared(name):
    model = make("llama", model_class=AutoModelForCausalLM)
    integration.set_alpha(model, nn.Parameter(ALPHAS[name].clone()))
    return model, tokens(2, 20)


def train(model, ids):
    """Two steps on the same batch in each process, so that averages of gradients are those of one process."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def work(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    for name in ALPHAS:
        model, ids = prepared(name)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        train(model, ids)
        with pytest.raises(ValueError, match="must be set before the model is wrapped"):
            integration.set_alpha(model, nn.Parameter(torch.tensor(1.5)))
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            model.save_pretrained(f"{folder}/{name}", state_dict=weights)
        distributed.barrier()
    distributed.destroy_process_group()


def test_a_sharded_alpha_is_learned_and_saved(tmp_path):
    """By fully_shard of layers and model: the same training as in one process, and the folder loads plainly."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(work, (port, str(tmp_path)), nprocs=2, start_method="spawn")
    for name, start in ALPHAS.items():
        model, ids = prepared(name)
        before = copy.deepcopy(model.model.entmax_alpha.value)
        train(model, ids)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        learned = loaded.model.entmax_alpha.value
        assert (learned - before).abs().min() > 1e-3
        assert learned.numel() == start.numel()
        for (key, ours), theirs in zip(loaded.named_parameters(), dict(model.named_parameters()).items(), strict=True):
            torch.testing.assert_close(ours, dict(model.named_parameters())[key], rtol=1e-4, atol=1e-5, msg=key)
            assert theirs
