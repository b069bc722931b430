"""Looks at what the steps of an engine run, without changing it."""

from dataclasses import replace

import torch

from mixed_requests import answers


class Steps:
    """Counts the steps of an engine by how they run, and looks for NaN in their logits."""

    def __init__(self, llm):
        self.runner = llm._core.runner
        self.num_replayed = self.num_launched = 0
        self.has_nan = torch.zeros((), dtype=torch.bool, device=self.runner.cache.device)
        self.prepare = self.runner._prepare
        self.runner._prepare = self.prepared

    def prepared(self, batch, sampling):
        prepared = self.prepare(batch, sampling)
        is_replayed = prepared.drawn is not None
        self.num_replayed += is_replayed
        self.num_launched += not is_replayed

        def run():
            logits = prepared.run()
            self.has_nan |= logits.isnan().any()
            return logits

        return replace(prepared, run=run)


class Logits:
    """Keeps the logits of every step of an engine."""

    def __init__(self, llm):
        self.llm = llm
        self.kept = []

    def of(self, requests, *, is_captured=True):
        """The answers, and the logits of each step's sampled rows."""
        runner = self.llm._core.runner
        graphs, prepare = runner.graphs, runner._prepare
        self.kept.clear()
        runner.graphs = graphs if is_captured else None
        runner._prepare = lambda *step: self.watched(prepare(*step))
        try:
            found = answers(self.llm, requests)
        finally:
            runner.graphs, runner._prepare = graphs, prepare
        if runner.cache.device.type == "cuda":
            torch.cuda.synchronize()
        return found, [logits.cpu() for logits in self.kept]

    def watched(self, prepared):
        def run():
            logits = prepared.run()
            self.kept.append(logits[: prepared.num_sampled].clone())
            return logits

        return replace(prepared, run=run)
