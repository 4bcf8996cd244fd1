//! The messages between two daemons.

use memlane_kvm::compat::{self, Incompatible};
use memlane_protocol::wire::attach::MAX_STATE_BYTES;
use memlane_protocol::wire::control::{Control, HEADER_BYTES, MAX_BODY_BYTES, Missing, decode_header};

use crate::text::check_plain;

/// Reads messages one after the other, as they come over a control connection.
pub fn control(mut bytes: &[u8]) {
    while let Some((head, rest)) = bytes.split_at_checked(HEADER_BYTES) {
        let Ok((kind, length)) = decode_header(head) else { return };
        assert!(length <= MAX_BODY_BYTES);
        let Some((body, rest)) = rest.split_at_checked(length) else { return };
        let Ok(message) = Control::decode(kind, body) else { return };
        let encoded = message.encode();
        let (head, body) = encoded.split_at(HEADER_BYTES);
        assert_eq!(decode_header(head), Ok((kind, body.len())));
        assert_eq!(Control::decode(kind, body).as_ref(), Ok(&message));
        check(&message);
        bytes = rest;
    }
}

fn check(message: &Control) {
    match message {
        Control::Offer(offer) => {
            // A guest that can run guests of its own is not moved at all.
            let nested = |reason: &Incompatible| matches!(reason, Incompatible::Nested(_));
            let unlike = compat::check(&offer.shape, &offer.shape);
            assert!(unlike.iter().all(nested), "a guest fits a host that is like it: {unlike:?}");
        }
        Control::Refuse(refusals) => refusals.iter().for_each(|refusal| check_plain(&refusal.reason)),
        Control::State { total, offset, bytes } => {
            assert!(*total <= MAX_STATE_BYTES && offset + bytes.len() as u64 <= *total);
        }
        Control::Missing(missing) => check_missing(missing),
        Control::Handover { reason, .. } => check_plain(reason),
        _ => {}
    }
}

/// The runs are the bits, in order.
fn check_missing(missing: &Missing) {
    let last = missing.first.saturating_add(64 * missing.words.len() as u64);
    let (mut pages, mut next) = (0, missing.first);
    for run in missing.runs() {
        assert!(next <= run.start && run.start <= run.end && run.end <= last, "{run:?}");
        pages += run.end - run.start;
        next = run.end;
    }
    let bits: u64 = missing.words.iter().map(|word| u64::from(word.count_ones())).sum();
    // There are no pages behind the last number.
    assert!(if last < u64::MAX { pages == bits } else { pages <= bits });
}
