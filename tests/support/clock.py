"""A clock that stands still until the test moves it, or whoever believes it to be the module `time` sleeps."""


class Clock:
    def __init__(self, now_s=0.0):
        self.now_s = now_s

    def __call__(self):
        return self.now_s

    time = perf_counter = monotonic = __call__

    def sleep(self, seconds):
        self.now_s += seconds
