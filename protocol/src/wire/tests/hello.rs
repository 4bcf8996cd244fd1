//! Versions, magic and limits of the first bytes between daemons.

use proptest::prelude::*;

use crate::wire::hello::{ANSWER_BYTES, Answer, HELLO_BYTES, Hello, Purpose, common_version};
use crate::wire::{MAX_TEXT_BYTES, WireError};

proptest! {
    #[test]
    fn the_common_version_is_the_newest_that_both_speak(ours: (u8, u8), theirs: (u8, u8)) {
        let wide = |(oldest, newest): (u8, u8)| (u16::from(oldest), u16::from(newest));
        let speaks = |(oldest, newest): (u16, u16), version| (oldest..=newest).contains(&version);
        let (ours, theirs) = (wide(ours), wide(theirs));
        let want = (0..=255).rev().find(|version| speaks(ours, *version) && speaks(theirs, *version));
        prop_assert_eq!(common_version(ours, theirs), want);
        prop_assert_eq!(common_version(theirs, ours), want);
    }
}

#[test]
fn lengths_are_those_that_the_reader_asks_for() {
    assert_eq!(hello().encode().len(), HELLO_BYTES);
    let refused = Answer::Refused { reason: "full".to_owned() }.encode();
    assert_eq!(Answer::text_bytes(&refused[..ANSWER_BYTES]), Ok(4));
    assert_eq!(refused.len(), ANSWER_BYTES + 4);
    assert_eq!(Answer::text_bytes(&Answer::Welcome { version: 1 }.encode()), Ok(0));
}

#[test]
fn a_wrong_magic_names_both() {
    let wrong = WireError::Magic { what: "hello", expected: *b"MLN\0", found: *b"GET " };
    let mut bytes = hello().encode();
    bytes[..4].copy_from_slice(b"GET ");
    assert_eq!(Hello::decode(&bytes), Err(wrong.clone()));
    let mut bytes = Answer::Welcome { version: 1 }.encode();
    bytes[..4].copy_from_slice(b"GET ");
    assert_eq!(Answer::text_bytes(&bytes), Err(wrong.clone()));
    assert_eq!(Answer::decode(&bytes), Err(wrong));
}

#[test]
fn an_unknown_purpose_is_named() {
    for purpose in [0, 6, u16::MAX] {
        let mut bytes = hello().encode();
        bytes[8..10].copy_from_slice(&purpose.to_le_bytes());
        let unknown = WireError::Unknown { what: "purpose of a connection", found: purpose.into() };
        assert_eq!(Hello::decode(&bytes), Err(unknown));
    }
}

#[test]
fn versions_the_wrong_way_round_are_refused() {
    let bytes = Hello { oldest: 3, newest: 2, ..hello() }.encode();
    let wrong = WireError::Value { what: "the oldest version in a hello", found: 3 };
    assert_eq!(Hello::decode(&bytes), Err(wrong));
}

#[test]
fn a_refusal_that_is_too_long_is_refused_by_its_head() {
    let mut head = Answer::Welcome { version: 1 }.encode();
    head[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    let (found, limit) = (u32::MAX.into(), MAX_TEXT_BYTES as u64);
    assert_eq!(
        Answer::text_bytes(&head),
        Err(WireError::TooLarge { what: "length of a refusal", found, limit })
    );
}

fn hello() -> Hello {
    Hello { oldest: 1, newest: 2, host: "host-a".parse().unwrap(), purpose: Purpose::Probe }
}
