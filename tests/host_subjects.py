"""Stand-ins for a model on a GPU: NumPy's own layers, for bisect to search; a fault is a function that is replaced."""

import numpy as np

from apr.config import Sampling, TransformerTrainConfig
from apr.infer.cpu_engine import CpuEngine
from apr.params import layout
from apr.reference import model as reference
from apr.reference.adamw import adamw_update
from apr.reference.cross_entropy import cross_entropy_forward_backward
from apr.reference.global_norm import clip_factor, global_norm
from apr.taps import tap_name
from apr.tools.weights import tensor_fault


class Host:
    """Parameters by name; `upload` is what the stand-in makes of a file's."""

    precision = "fp32"

    def __init__(self, source, upload=lambda name, array: array):
        self.config, self.model = None, source.config
        self.params = {name: np.array(upload(name, np.array(source.read(name), np.float32))) for name in source.shapes}

    def stored(self, spec):
        """A parameter."""
        return self.params[spec.name]

    def byte_faults(self, source):
        """As weights.byte_faults."""
        for name, array in self.params.items():
            yield name, tensor_fault(name, np.array(source.read(name), np.float32), array)


class HostEngine(Host):
    """bisect.Generating. `kept`: what happens to the cache between prompt and decoding."""

    def __init__(self, source, upload=lambda name, array: array, S=64):
        super().__init__(source, upload)
        self.S, self.engine = S, CpuEngine(source.config, self.params, 1, S)
        self.cache = CpuEngine._cache(self.engine, 1)
        self.engine._cache = lambda count: self.cache  # one slot for all sequences, as on a GPU

    def record(self, ids, cached, tap):
        """See bisect.Generating."""
        self.cache.lengths[0] = 0
        self.engine.scores([ids], [cached], tap)
        return {tap_name(f"{kind}_cache", layer): array[layer, :, :len(ids)].copy() for layer in range(self.model.L)
                for kind, array in (("k", self.cache.k), ("v", self.cache.v))}


    def generate(self, ids, count):
        """See bisect.Generating."""
        self.cache.lengths[0] = 0
        return [int(step[0]) for step in self.engine.generate([ids], Sampling(self.model.V), count)]


class HostTrainer(Host):
    """bisect.Training; `cross_entropy` and `adamw` may be replaced."""

    def __init__(self, source, upload=lambda name, array: array):
        super().__init__(source, upload)
        self.config = TransformerTrainConfig(max_grad_norm=0.1, weight_decay=0.1)
        self.m, self.v, self.gradient = ({n: np.zeros_like(a) for n, a in self.params.items()} for _ in range(3))
        self.cross_entropy, self.adamw, self.step = cross_entropy_forward_backward, adamw_update, 0

    def gradients(self, batch, dloss, tap):
        """See bisect.Training."""
        self.gradient = {n: np.zeros_like(a) for n, a in self.params.items()}
        saved = {}
        logits = reference.model_forward(self.params, self.model, batch.inputs, saved, tap)
        losses = self.cross_entropy(logits.reshape(-1, self.model.V), batch.targets.reshape(-1), dloss)
        reference.model_backward(self.params, self.gradient, self.model, logits, saved, tap)
        return losses

    def evaluate(self, batch):
        """See bisect.Training."""
        rows = self.scores(batch.inputs).reshape(-1, self.model.V)
        losses = self.cross_entropy(rows, batch.targets.reshape(-1), None)
        return losses, float(losses.sum(dtype=np.float64))

    def scores(self, ids):
        """See bisect.Training."""
        return reference.model_forward(self.params, self.model, ids)

    def state(self):
        """See bisect.Training."""
        return {key: {n: a.copy() for n, a in arrays.items()} for key, arrays in
                (("master", self.params), ("m", self.m), ("v", self.v))}

    def grads(self):
        """See bisect.Training."""
        return {n: a.copy() for n, a in self.gradient.items()}

    def update(self, batch, lr):
        """See bisect.Training."""
        self.gradients(batch, 1.0 / batch.num_tokens, None)
        self.step += 1
        norm, c = global_norm(np.concatenate([g.reshape(-1) for g in self.gradient.values()])), self.config
        for spec in layout(self.model).specs:
            flat = (a[spec.name].reshape(-1) for a in (self.params, self.m, self.v, self.gradient))
            self.adamw(*flat, lr=lr, beta1=c.beta1, beta2=c.beta2, eps=c.adam_eps, step=self.step,
                       grad_scale=clip_factor(norm, c.max_grad_norm), weight_decay=c.weight_decay * spec.decay)
        return norm, self.step
