"""What the tests of torch and of transformers share."""

# SPDX-License-Identifier: BSD-3-Clause

import contextlib

import torch


@contextlib.contextmanager
def one_thread():
    """One thread of torch is fastest for small models."""
    n_thread = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_thread)


class Graphs(list):
    """A backend that keeps the graphs and runs them as they are."""

    def __call__(self, graph, inputs):
        self.append(graph)
        return graph

    def operators(self):
        nodes = [n for g in self for m in g.modules() for n in m.graph.nodes]
        return sum(str(node.target).startswith("posenc.") for node in nodes)


def tiny_config(rope_parameters=None, **changes):
    """Return the config of a small Llama that was trained on 32 tokens."""
    from transformers import LlamaConfig

    values = {
        "vocab_size": 61,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "rope_parameters": {"rope_theta": 10000.0, **(rope_parameters or {})},
        "attn_implementation": "sdpa",
        # Tokens far from each other in logits, so that argmax is no coin toss.
        "initializer_range": 0.2,
    }
    return LlamaConfig(**(values | changes))


def tiny(rope_parameters=None, **changes):
    """Return that Llama, the same one each time."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(rope_parameters, **changes)).eval()
