//! Texts that are too long, and labels that are none.

use proptest::prelude::*;

use super::Codec;
use crate::handover::Message;
use crate::wire::attach::{FromVmm, Reply, ToVmm};
use crate::wire::control::{Control, Refusal, RefusalKind};
use crate::wire::hello::Answer;
use crate::wire::reader::{Reader, put_text};
use crate::wire::{Label, MAX_TEXT_BYTES, WireError, is_obeyed};

proptest! {
    #[test]
    fn a_long_text_is_cut_at_a_character(start in 0..4usize, fill in "[\\PC&&[^\\p{Zl}\\p{Zp}]]", tail in "\\PC{0,20}") {
        let text = "x".repeat(start) + &fill.repeat(MAX_TEXT_BYTES) + &tail;
        let mut out = Vec::new();
        put_text(&mut out, &text);
        let written = std::str::from_utf8(&out).unwrap();
        prop_assert!(text.starts_with(written));
        prop_assert!(out.len() <= MAX_TEXT_BYTES && out.len() + fill.len() > MAX_TEXT_BYTES);
        prop_assert_eq!(Reader::new(&out).text("text"), Ok(written.to_owned()));
    }

    #[test]
    fn no_reason_has_control_characters(reason: String, word in any::<[char; 3]>()) {
        let reason = reason + "\u{1b}[2J" + &String::from_iter(word);
        let (handover, refused) = (
            Control::Handover { migration: [1; 16], message: Message::Abort, nanoseconds: 0, reason: reason.clone() },
            ToVmm::Refused { reason: reason.clone() },
        );
        let Ok(Control::Handover { reason: heard, .. }) = Control::read(&handover.write()) else { panic!() };
        prop_assert!(!heard.contains(is_obeyed), "{heard:?}");
        let Ok(ToVmm::Refused { reason: heard }) = ToVmm::read(&refused.write()) else { panic!() };
        prop_assert!(!heard.contains(is_obeyed), "{heard:?}");
        let refusal = Control::Refuse(vec![Refusal { what: RefusalKind::Memory, reason: reason.clone() }]);
        let Ok(Control::Refuse(refusals)) = Control::read(&refusal.write()) else { panic!() };
        prop_assert!(!refusals[0].reason.contains(is_obeyed), "{refusals:?}");
        let Ok(Answer::Refused { reason: heard }) = Answer::read(&Answer::Refused { reason }.write()) else { panic!() };
        prop_assert!(!heard.contains(is_obeyed), "{heard:?}");
    }

    #[test]
    fn any_name_is_a_label_or_refused(name in "\\PC{0,80}|[A-Za-z0-9._-]{0,80}") {
        let first = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
        let safe = name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
        match name.parse::<Label>() {
            Ok(label) => {
                prop_assert!(first && safe && name.len() < 64);
                prop_assert_eq!(label.as_str(), &name);
                prop_assert_eq!(label.write().len(), 64);
            }
            Err(_) => prop_assert!(!first || !safe || name.len() > 63),
        }
    }
}

/// Every message that carries a text writes one that its reader takes.
#[test]
fn long_reasons_arrive_short() {
    let long = "é".repeat(MAX_TEXT_BYTES);
    let cut = "é".repeat(MAX_TEXT_BYTES / 2);

    let sent = FromVmm::Reply(Reply { id: 7, outcome: Err(long.clone()) });
    let received = FromVmm::Reply(Reply { id: 7, outcome: Err(cut.clone()) });
    assert_eq!(FromVmm::read(&sent.write()), Ok(received));

    let received = ToVmm::Refused { reason: cut.clone() };
    assert_eq!(ToVmm::read(&ToVmm::Refused { reason: long.clone() }.write()), Ok(received));

    let received = Answer::Refused { reason: cut.clone() };
    assert_eq!(Answer::read(&Answer::Refused { reason: long.clone() }.write()), Ok(received));

    let refusal = |reason: &str| Refusal { what: RefusalKind::Memory, reason: reason.to_owned() };
    let sent = Control::Refuse(vec![refusal(&long), refusal("after it")]);
    let received = Control::Refuse(vec![refusal(&cut), refusal("after it")]);
    assert_eq!(Control::read(&sent.write()), Ok(received));

    let handover = |reason: &str| Control::Handover {
        migration: [1; 16],
        message: Message::Declined,
        nanoseconds: 0,
        reason: reason.to_owned(),
    };
    assert_eq!(Control::read(&handover(&long).write()), Ok(handover(&cut)));
}

/// What stands in the place of a character that a terminal would obey takes more bytes than that.
#[test]
fn a_text_that_is_made_plain_fits_a_message() {
    let refused = |reason: String| ToVmm::Refused { reason };
    let heard = ToVmm::read(&refused("\u{1}".repeat(MAX_TEXT_BYTES)).write());
    let plain = refused("\u{fffd}".repeat(MAX_TEXT_BYTES / 3));
    assert_eq!(heard.as_ref(), Ok(&plain));
    assert_eq!(ToVmm::read(&plain.write()), heard, "another host hears the same");
}

#[test]
fn a_text_that_was_not_cut_is_refused() {
    let text = vec![b'x'; MAX_TEXT_BYTES + 1];
    let (found, limit) = (MAX_TEXT_BYTES as u64 + 1, MAX_TEXT_BYTES as u64);
    assert_eq!(Reader::new(&text).text("text"), Err(WireError::TooLarge { what: "text", found, limit }));
    assert_eq!(Reader::new(&text[1..]).text("text").unwrap().len(), MAX_TEXT_BYTES);
    assert_eq!(Reader::new(&[b'x', 0xff]).text("text"), Err(WireError::Text("text")));
}
