"""The callback for Stable-Baselines3, with real algorithms on a small environment."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from torch import nn

from relu_doctor.integrations.stable_baselines3 import ReLUDoctorCallback
from tests.integrations.toys import QUIET, same

pytestmark = [pytest.mark.filterwarnings(each) for each in QUIET]


class Task(gymnasium.Env):
    """Five numbers that walk at random; the reward is how near the action is to the first."""

    def __init__(self, discrete: bool) -> None:
        self.observation_space = gymnasium.spaces.Box(-5, 5, (5,), np.float32)
        box = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(3) if discrete else box

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.steps = np.zeros(5, np.float32), 0
        return self.state, {}

    def step(self, action):
        self.steps += 1
        noise = self.np_random.normal(size=5).astype(np.float32)
        self.state = np.clip(self.state * np.float32(0.9) + noise, -5, 5)
        return self.state, -abs(float(np.ravel(action)[0]) - float(self.state[0])), self.steps >= 20, False, {}


OFF_POLICY = {"learning_starts": 32, "batch_size": 16, "train_freq": 4, "buffer_size": 1000}
ALGORITHMS = {
    "A2C": (A2C, True, {"n_steps": 16}),
    "PPO": (PPO, True, {"n_steps": 64, "batch_size": 16, "n_epochs": 4}),
    "DQN": (DQN, True, {**OFF_POLICY, "target_update_interval": 50}),
    "SAC": (SAC, False, {**OFF_POLICY, "gradient_steps": 2}),
    "TD3": (TD3, False, {**OFF_POLICY, "gradient_steps": 2}),
}


def made(name):
    kind, discrete, options = ALGORITHMS[name]
    policy = {"activation_fn": nn.ReLU, "net_arch": [16, 16]}  # algorithms write to it
    return kind("MlpPolicy", Task(discrete), seed=0, device="cpu", policy_kwargs=policy, **options)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_run_is_the_same_run(name):
    """All parameters and optimizer states, the rewards and the random numbers are those of a run without it."""
    left = []
    for callback in (None, ReLUDoctorCallback(every=3, window=20)):
        model = made(name)
        model.learn(500 if name in {"SAC", "TD3"} else 900, callback=callback)
        rewards = [each["r"] for each in model.ep_info_buffer]
        left.append([model.get_parameters(), rewards, torch.rand(3), np.random.random()])  # noqa: NPY002  its own state
    assert callback.monitor.windows > 0
    assert same(*left)


ON_POLICY = [f"mlp_extractor.{part}.{place}" for part in ("policy_net", "value_net") for place in (1, 3)]
CRITICS = [f"critic.{part}.{place}" for part in ("qf0", "qf1") for place in (1, 3)]
SITES = {
    "A2C": ON_POLICY,
    "PPO": ON_POLICY,
    "DQN": ["q_net.q_net.1", "q_net.q_net.3"],
    "SAC": ["actor.latent_pi.1", "actor.latent_pi.3", *CRITICS],
    "TD3": ["actor.mu.1", "actor.mu.3", *CRITICS],
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_policy_and_critics_are_watched_and_rollouts_and_targets_are_not(name):
    """Each network that is trained has its sites; each is observed on the batches of its updates and no others."""
    model, updates = made(name), []
    callback = ReLUDoctorCallback(every=1, window=10_000)
    leading = getattr(getattr(model.policy, "actor", None), "optimizer", None) or model.policy.optimizer
    leading.register_step_post_hook(lambda *args: updates.append(1))
    model.learn(400, callback=callback)
    sites = callback.monitor.sites
    assert sorted(sites["site"]) == sorted(SITES[name])
    assert sites["num_units"].tolist() == [16] * len(sites)
    assert callback.monitor.timeline["last_step"].unique().tolist() == [len(updates)]
    own = callback.monitor.units.query("site.str.contains('policy_net|q_net|actor')")
    assert own["inputs"].unique().tolist() == [16 * len(updates)]


def test_scalars_are_recorded_by_the_algorithms_logger(tmp_path, capsys):
    """In its files with all sites, and on the terminal in all."""
    model = made("DQN")
    model.set_logger(configure(str(tmp_path), ["stdout", "csv"]))
    model.learn(900, callback=ReLUDoctorCallback(every=3, window=20), log_interval=4)
    model.logger.close()
    header = (tmp_path / "progress.csv").read_text().splitlines()[0]
    assert "relu_doctor/dead_fraction" in header
    assert "relu_doctor_sites/q_net.q_net.1/dead_fraction" in header
    printed = capsys.readouterr().out
    assert "dead_fraction" in printed
    assert "q_net" not in printed


def test_a_second_learn_goes_on_with_the_evidence_and_the_step():
    """With the same model; state_dict() carries them to another process; another model begins anew."""
    callback, model = ReLUDoctorCallback(every=2, window=10_000), made("DQN")
    model.learn(200, callback=callback)
    first = callback.monitor.timeline["last_step"].max()
    model.learn(200, callback=callback, reset_num_timesteps=False)
    second = callback.monitor.timeline
    assert second["first_step"].min() == first + 1
    other = ReLUDoctorCallback(every=2, window=10_000)
    other.load_state_dict(callback.state_dict())
    model.learn(200, callback=other, reset_num_timesteps=False)
    assert other.monitor.timeline["first_step"].min() == second["last_step"].max() + 1
    made("DQN").learn(200, callback=other)
    assert other.monitor.timeline["first_step"].min() == 1


class Fails(BaseCallback):
    def _on_step(self):
        if self.num_timesteps == 150:
            raise KeyboardInterrupt
        return True


def test_a_learn_that_is_interrupted_is_let_go_of():
    """By the next learn, and by close(); no hook is left."""
    callback, model = ReLUDoctorCallback(every=2, window=20), made("SAC")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model.learn(300, callback=[callback, Fails()])
    callback.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.policy.modules())
    assert not model.actor.optimizer._optimizer_step_post_hooks
