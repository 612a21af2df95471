"""The group secret: MACs, epochs, the file."""

import contextlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm import group_secret
from swarm.errors import ConfigError
from swarm.group_secret import Epoch, GroupSecret

NETWORK = bytes(range(32))
A, B, C = (Epoch(number, bytes([number]) * 31 + b"!") for number in (1, 2, 3))


def test_members_accept_each_others_datagrams():
    epoch, mac = GroupSecret((A,), NETWORK).mac(b"ping")
    assert (epoch, len(mac)) == (1, 16)
    assert GroupSecret((A,), NETWORK).check(epoch, mac, b"ping")


def test_an_outsider_with_another_secret_is_refused():
    epoch, mac = GroupSecret((Epoch(1, B.secret),), NETWORK).mac(b"ping")
    assert not GroupSecret((A,), NETWORK).check(epoch, mac, b"ping")


def test_a_datagram_of_another_network_with_the_same_secret_is_refused():
    epoch, mac = GroupSecret((A,), bytes(32)).mac(b"ping")
    assert not GroupSecret((A,), NETWORK).check(epoch, mac, b"ping")


@pytest.mark.parametrize("length", [0, 1, 15, 17, 32])
def test_a_mac_of_another_length_is_refused(length):
    secret = GroupSecret((A,), NETWORK)
    _, mac = secret.mac(b"ping")
    assert not secret.check(1, (mac + mac)[:length], b"ping")


@given(bit=st.integers(0, 16 * 8 - 1))
@settings(max_examples=50, deadline=None)
def test_a_flipped_bit_in_the_mac_is_refused(bit):
    secret = GroupSecret((A,), NETWORK)
    epoch, mac = secret.mac(b"ping")
    flipped = int.from_bytes(mac, "big") ^ 1 << bit
    assert not secret.check(epoch, flipped.to_bytes(16, "big"), b"ping")


def test_changed_data_is_refused():
    secret = GroupSecret((A,), NETWORK)
    epoch, mac = secret.mac(b"ping")
    assert not secret.check(epoch, mac, b"pong")


def test_a_mac_passed_off_under_another_epoch_is_refused():
    secret = GroupSecret((A, B), NETWORK)
    _, mac = secret.mac(b"ping")
    assert not secret.check(2, mac, b"ping")
    assert not secret.check(200, mac, b"ping")


def test_at_every_moment_of_a_change_all_nodes_understand_each_other():
    files: list[tuple[Epoch, ...]] = [(A,)]
    for _ in range(4):  # two whole changes
        files.append(group_secret.rotate(files[-1])[0])
    for old, new in itertools.pairwise(files):  # while a file is handed out, some nodes have the one before
        for sender, receiver in ((old, new), (new, old)):
            epoch, mac = GroupSecret(sender, NETWORK).mac(b"ping")
            assert GroupSecret(receiver, NETWORK).check(epoch, mac, b"ping")


def test_a_change_ends_the_old_secret():
    epochs: tuple[Epoch, ...] = (A,)
    for _ in range(4):
        epochs, _ = group_secret.rotate(epochs)
    epoch, mac = GroupSecret((A,), NETWORK).mac(b"ping")
    assert not GroupSecret(epochs, NETWORK).check(epoch, mac, b"ping")


def test_a_change_takes_two_steps():
    waiting, activated = group_secret.rotate((A,))
    assert (waiting[0], activated, [epoch.number for epoch in waiting]) == (A, False, [1, 2])
    done, activated = group_secret.rotate(waiting)
    assert ([epoch.number for epoch in done], activated) == ([2, 1], True)
    assert len(group_secret.rotate(done)[0]) == 3


def test_epochs_go_round_after_255():
    last = Epoch(255, A.secret)
    waiting, _ = group_secret.rotate((last,))
    assert [epoch.number for epoch in waiting] == [255, 0]
    assert [epoch.number for epoch in group_secret.rotate(waiting)[0]] == [0, 255]


@given(
    epochs=st.lists(st.tuples(st.integers(0, 255), st.binary(min_size=32, max_size=32)), min_size=1, max_size=3).filter(
        lambda pairs: all(len(set(secret)) > 1 for _, secret in pairs)
    )
)
@settings(max_examples=50, deadline=None)
def test_a_file_is_read_as_it_was_written(epochs):
    written = tuple(Epoch(number, secret) for number, secret in epochs)
    assert group_secret.parse(group_secret.render(written)) == written


@given(data=st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_garbage_in_the_file_is_a_clean_error(data):
    with contextlib.suppress(ConfigError):
        group_secret.parse(data)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"# nothing\n",
        b"1\n",
        b"1 abcd\n",
        b"x " + b"ab" * 32,
        b"256 " + b"ab" * 31 + b"cd",
        b"-1 " + b"ab" * 31 + b"cd",
        b"1 " + b"zz" * 32,
        b"1 " + b"ab" * 31 + b"cd more",
        b"1 " + b"ab" * 33,
    ],
)
def test_a_malformed_file_is_refused(text):
    with pytest.raises(ConfigError):
        group_secret.parse(text)


@pytest.mark.parametrize("byte", [0, 0xAB, 0xFF])
def test_a_secret_that_is_a_placeholder_is_refused(byte):
    with pytest.raises(ConfigError, match="no secret"):
        group_secret.parse(b"1 " + bytes([byte]).hex().encode() * 32)


def test_an_error_does_not_repeat_the_secret():
    text = b"1 " + A.secret.hex().encode() + b"f"
    with pytest.raises(ConfigError) as caught:
        group_secret.parse(text)
    assert A.secret.hex()[:8] not in repr(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("epochs", [(), (A, B, C, Epoch(4, A.secret)), (A, A)])
def test_no_secret_too_many_and_twice_the_same_epoch_are_refused(epochs):
    with pytest.raises(ConfigError):
        GroupSecret(epochs, NETWORK)


def test_secrets_are_not_in_what_is_printed():
    secret = GroupSecret((A, B), NETWORK)
    for text in (repr(secret), repr(secret.epochs), str(A)):
        assert A.secret.hex() not in text
        assert repr(A.secret) not in text
