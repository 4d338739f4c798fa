"""A model of Transformers whose weights are sharded over two processes: alpha is one of them."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("entmax")

from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM
from transformers_models import make, tokens

from flash_entmax.integrations import transformers as integration

pytestmark = pytest.mark.xdist_group("distributed")
STARTS = {"with the model": torch.tensor(1.3), "by itself": torch.tensor([1.2, 1.4, 1.6, 1.8])}


def prepared(name):
    model = make("llama", model_class=AutoModelForCausalLM)
    integration.set_alpha(model, nn.Parameter(STARTS[name].clone()))
    return model, tokens(2, 20)


def shard(group, model, name, **policy):
    policy["mesh"] = DeviceMesh.from_group(group, "cpu")
    if name == "by itself":  # so that it has a policy of its own, and is gathered at each call
        fully_shard(model.model.entmax_alpha, mesh=policy["mesh"])
    for part in (*model.model.layers, model):
        fully_shard(part, **policy)


def train(model, ids):
    """Two steps on the same batch in each process, so that averages of gradients are those of one process."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def work(group, folder):
    for name in STARTS:
        model, ids = prepared(name)
        shard(group, model, name)
        train(model, ids)
        with pytest.raises(ValueError, match="must be set before the model is wrapped"):
            integration.set_alpha(model, nn.Parameter(torch.tensor(1.5)))
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if distributed.get_rank() == 0:
            model.save_pretrained(f"{folder}/{name}", state_dict=weights)
        distributed.barrier(group)
    return [dtype_in_mixed_precision(group, name) for name in ("with the model", "by itself")]


def dtype_in_mixed_precision(group, name):
    model, ids = prepared(name)
    shard(group, model, name, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    seen = []
    model.model.entmax_alpha.register_forward_hook(lambda module, inputs, alpha: seen.append(alpha.dtype))
    with torch.no_grad():
        model(ids)
    return seen[-1]


def test_a_sharded_alpha_is_learned_and_saved(pool, tmp_path):
    """By fully_shard of layers and model: the same training as in one process, and the folder loads plainly."""
    for dtypes in pool.run(2, work, str(tmp_path)):
        assert dtypes == [torch.bfloat16, torch.float32]
    for name, start in STARTS.items():
        model, ids = prepared(name)
        train(model, ids)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert (loaded.model.entmax_alpha.value - start).abs().min() > 1e-3
        wanted = dict(model.named_parameters())
        for key, weight in loaded.named_parameters():
            torch.testing.assert_close(weight, wanted.pop(key), rtol=1e-4, atol=1e-5)
        assert not wanted
