//! Limits, checksums and kinds of control messages.

use proptest::prelude::*;

use super::machine::largest_shape;
use super::{Codec, strategies};
use crate::handover::Message;
use crate::wire::attach::MAX_STATE_BYTES;
use crate::wire::control::{
    Accept, Control, HEADER_BYTES, MAX_BODY_BYTES, MAX_DEFINITION_BYTES, MAX_DIGESTS, MAX_DISKS,
    MAX_NAME_BYTES, MAX_PART_BYTES, MAX_PARTS, MAX_PORTS, MAX_RANGES, MAX_REFUSALS, MAX_STATE_CHUNK_BYTES,
    MAX_WORDS, Missing, Offer, Port, QemuGuest, Refusal, RefusalKind, decode_header,
};
use crate::wire::{MAX_TEXT_BYTES, WireError};

/// Bytes of a body before its list: of a piece of state, and of the token of an accept.
const STATE_BYTES: usize = 24;
const TOKEN_BYTES: usize = 16;

proptest! {
    #[test]
    fn a_header_of_any_bytes_is_read_or_refused(bytes: [u8; HEADER_BYTES]) {
        if let Ok((_, length)) = decode_header(&bytes) {
            prop_assert!(length <= MAX_BODY_BYTES);
        }
    }

    #[test]
    fn a_body_of_any_kind_and_bytes_is_read_or_refused(
        kind in 0..20u16,
        body in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        if let Ok(message) = Control::decode(kind, &body) {
            super::round_trips(&message)?;
        }
    }

    #[test]
    fn a_changed_state_does_not_pass_its_checksum(
        state in strategies::state(),
        at in any::<prop::sample::Index>(),
        mask in 1..=u8::MAX,
    ) {
        let mut bytes = state.write();
        let first = HEADER_BYTES + STATE_BYTES;
        prop_assume!(bytes.len() > first);
        let at = first + at.index(bytes.len() - first);
        bytes[at] ^= mask;
        let changed = Control::read(&bytes);
        prop_assert!(matches!(changed, Err(WireError::Checksum { what: "state", .. })), "{changed:?}");
    }
}

#[test]
fn the_largest_messages_fit_into_a_body() {
    let port = Port {
        name: "p".repeat(63).parse().unwrap(),
        address: "[2001:db8::1]:8444".parse().unwrap(),
        lanes: u16::MAX,
    };
    let refusal = Refusal { what: RefusalKind::Host, reason: "x".repeat(MAX_TEXT_BYTES) };
    let bytes = vec![7; MAX_STATE_CHUNK_BYTES];
    let shape = largest_shape();
    let name = "n".repeat(MAX_NAME_BYTES);
    let qemu = Some(Box::new(QemuGuest {
        machine: name.clone(),
        cpu: name.clone(),
        accelerator: name.clone(),
        disks: vec![name; MAX_DISKS],
        definition: "d".repeat(MAX_DEFINITION_BYTES),
        parts: vec!["p".repeat(MAX_PART_BYTES); MAX_PARTS],
    }));
    for message in [
        Control::LanesFrom(vec![[1, 2, 3, 4].into(); MAX_PORTS]),
        Control::Offer(Offer { migration: [1; 16], check_only: true, data_bytes: u64::MAX, shape, qemu }),
        Control::Accept(Accept { token: [2; 16], ports: vec![port; MAX_PORTS] }),
        Control::Refuse(vec![refusal; MAX_REFUSALS]),
        Control::Holes((0..MAX_RANGES as u64).map(|page| page * 2..page * 2 + 1).collect()),
        Control::Digests { digests: vec![(u64::MAX, u128::MAX); MAX_DIGESTS], last: true },
        Control::State { total: MAX_STATE_BYTES, offset: MAX_STATE_BYTES - bytes.len() as u64, bytes },
        Control::Missing(Missing { first: 64, words: vec![u64::MAX; MAX_WORDS], last: true }),
    ] {
        let bytes = message.write();
        assert!(bytes.len() <= HEADER_BYTES + MAX_BODY_BYTES, "{}: {} bytes", message.name(), bytes.len());
        assert!(Control::read(&bytes) == Ok(message));
    }
}

#[test]
fn a_header_names_an_unknown_kind_and_bounds_the_body() {
    for kind in [0, 24, u16::MAX] {
        let unknown = WireError::Unknown { what: "control message", found: kind.into() };
        assert_eq!(decode_header(&header(kind, 0)), Err(unknown.clone()));
        assert_eq!(Control::decode(kind, &[]), Err(unknown));
    }
    let limit = MAX_BODY_BYTES as u32;
    assert_eq!(decode_header(&header(4, limit)), Ok((4, MAX_BODY_BYTES)));
    for found in [limit + 1, u32::MAX] {
        let what = "length of a control message";
        let refused = WireError::TooLarge { what, found: found.into(), limit: limit.into() };
        assert_eq!(decode_header(&header(4, found)), Err(refused));
    }
    assert_eq!(decode_header(&[0; HEADER_BYTES + 1]), Err(WireError::Trailing(1)));
}

/// The list that has too many entries is not even there.
#[test]
fn counts_are_checked_before_their_lists_are_read() {
    let refused = |what, found: usize, limit: usize| {
        Err(WireError::TooLarge { what, found: found as u64, limit: limit as u64 })
    };
    for more in [1, 1000] {
        let found = MAX_PORTS + more;
        let body = [vec![0; TOKEN_BYTES], (found as u16).to_le_bytes().to_vec()].concat();
        assert_eq!(Control::decode(2, &body), refused("count of ports", found, MAX_PORTS));

        let found = MAX_REFUSALS + more;
        let body = (found as u16).to_le_bytes();
        assert_eq!(Control::decode(3, &body), refused("count of refusals", found, MAX_REFUSALS));

        let found = MAX_RANGES + more;
        let body = (found as u32).to_le_bytes();
        assert_eq!(Control::decode(6, &body), refused("count of holes", found, MAX_RANGES));

        let found = MAX_DIGESTS + more;
        let body = [(found as u32).to_le_bytes(), [0; 4]].concat();
        assert_eq!(Control::decode(10, &body), refused("count of digests", found, MAX_DIGESTS));

        let found = MAX_STATE_CHUNK_BYTES + more;
        let body = state_head(MAX_STATE_BYTES, 0, found as u32);
        assert_eq!(Control::decode(11, &body), refused("piece of a state", found, MAX_STATE_CHUNK_BYTES));

        let found = MAX_TEXT_BYTES + more;
        let length = (found as u16).to_le_bytes();
        let body = [1, 0, RefusalKind::Host as u8, 0, length[0], length[1]];
        assert_eq!(Control::decode(3, &body), refused("reason of a refusal", found, MAX_TEXT_BYTES));
    }
}

#[test]
fn a_state_is_not_over_its_limit() {
    let (found, limit) = (MAX_STATE_BYTES + 1, MAX_STATE_BYTES);
    let refused = WireError::TooLarge { what: "length of a state", found, limit };
    assert_eq!(Control::decode(11, &state_head(found, 0, 0)), Err(refused));
    assert!(Control::decode(11, &state_head(limit, limit, 0)).is_ok());
}

#[test]
fn a_piece_lies_within_its_state() {
    let piece = |offset| Control::State { total: 10, offset, bytes: vec![7; 4] };
    assert_eq!(Control::read(&piece(6).write()), Ok(piece(6)));
    for (offset, found) in [(7, 11), (10, 14), (11, 15), (u64::MAX, u64::MAX)] {
        let refused = WireError::TooLarge { what: "end of a piece of state", found, limit: 10 };
        assert_eq!(Control::read(&piece(offset).write()), Err(refused));
    }
}

#[test]
fn a_checksum_that_does_not_fit_shows_both() {
    let mut bytes = Control::State { total: 9, offset: 0, bytes: b"123456789".to_vec() }.write();
    bytes[HEADER_BYTES + 16..HEADER_BYTES + 20].copy_from_slice(&1u32.to_le_bytes());
    // The check value of CRC-32C (RFC 3720, "Castagnoli") over these nine digits.
    let wrong = WireError::Checksum { what: "state", found: 1, computed: 0xe306_9283 };
    assert_eq!(Control::read(&bytes), Err(wrong));
}

#[test]
fn an_unknown_respect_is_named() {
    for what in [0, 10, u8::MAX] {
        let unknown = WireError::Unknown { what: "kind of a refusal", found: what.into() };
        assert_eq!(Control::decode(3, &[1, 0, what, 0, 0, 0]), Err(unknown));
    }
}

/// Offer, accept and refuse carry more than a word, and are no words on the wire.
#[test]
fn an_unknown_word_of_the_handover_is_named() {
    for message in [Message::Offer, Message::Accept, Message::Refuse] {
        let handover =
            Control::Handover { migration: [1; 16], message, nanoseconds: 0, reason: String::new() };
        let unknown = WireError::Unknown { what: "word of the handover", found: 0 };
        assert_eq!(Control::read(&handover.write()), Err(unknown));
    }
    let mut body = [0; 32];
    body[24] = 13;
    let unknown = WireError::Unknown { what: "word of the handover", found: 13 };
    assert_eq!(Control::decode(12, &body), Err(unknown));
}

#[test]
fn an_ipv4_address_comes_back_as_one() {
    let accept = |address: &str| {
        let name = "fast0".parse().unwrap();
        let ports = vec![Port { name, address: address.parse().unwrap(), lanes: 2 }];
        Control::Accept(Accept { token: [0; 16], ports })
    };
    let received = Control::read(&accept("[::ffff:192.0.2.1]:8444").write());
    assert_eq!(received, Ok(accept("192.0.2.1:8444")));
}

fn header(kind: u16, bytes: u32) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 2], &bytes.to_le_bytes()].concat()
}

/// What comes before the bytes of a piece of state; the checksum is that of no bytes.
fn state_head(total: u64, offset: u64, bytes: u32) -> Vec<u8> {
    [&total.to_le_bytes()[..], &offset.to_le_bytes(), &[0; 4], &bytes.to_le_bytes()].concat()
}
