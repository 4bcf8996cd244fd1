//! Kinds and limits of the packets between daemon and VMM.

use crate::wire::WireError;
use crate::wire::attach::{
    FromVmm, MAX_PACKET_BYTES, MAX_STATE_BYTES, Reply, Request, RunState, ToVmm, VmmHello,
};

use super::machine::{largest_shape, shape};

/// Where the fields of a packet lie: magic, kind, reserved, number; then the VMM's hello.
const KIND: usize = 4;
const BODY: usize = 12;
const RUN_STATE: usize = BODY + 4;

#[test]
fn the_largest_guest_fits_into_a_packet() {
    let hello = FromVmm::Hello(VmmHello { shape: largest_shape(), ..hello() });
    let bytes = hello.encode();
    assert!(bytes.len() <= MAX_PACKET_BYTES, "{} bytes", bytes.len());
    assert_eq!(FromVmm::decode(&bytes), Ok(hello));
}

#[test]
fn a_wrong_magic_names_both() {
    let wrong = WireError::Magic { what: "attach packet", expected: *b"MLAT", found: *b"mlat" };
    let mut bytes = ToVmm::Request { id: 1, request: Request::Resume }.encode();
    bytes[..4].copy_from_slice(b"mlat");
    assert_eq!(ToVmm::decode(&bytes), Err(wrong.clone()));
    assert_eq!(FromVmm::decode(&bytes), Err(wrong));
}

#[test]
fn unknown_kinds_are_named() {
    let mut bytes = ToVmm::Request { id: 1, request: Request::Resume }.encode();
    for kind in [0, 5, 15, 18, 31, 48, u16::MAX] {
        bytes[KIND..KIND + 2].copy_from_slice(&kind.to_le_bytes());
        let unknown = |what| WireError::Unknown { what, found: kind.into() };
        assert_eq!(ToVmm::decode(&bytes), Err(unknown("request to a VMM")));
        assert_eq!(FromVmm::decode(&bytes), Err(unknown("packet from a VMM")));
    }
}

#[test]
fn a_packet_for_the_other_side_is_unknown() {
    let reply = FromVmm::Reply(Reply { id: 1, outcome: Ok([0; 2]) }).encode();
    assert!(matches!(ToVmm::decode(&reply), Err(WireError::Unknown { found: 2, .. })));
    let welcome = ToVmm::Welcome { version: 1 }.encode();
    assert!(matches!(FromVmm::decode(&welcome), Err(WireError::Unknown { found: 16, .. })));
}

/// The shim writes and reads these by hand, without this crate.
#[test]
fn a_shim_speaks_in_bytes_that_do_not_change() {
    let shim = FromVmm::Shim { oldest: 1, newest: 0x0203 };
    assert_eq!(shim.encode(), b"MLAT\x04\0\0\0\0\0\0\0\x01\0\x03\x02");
    let done = FromVmm::Reply(Reply { id: 0x0102_0304, outcome: Ok([0; 2]) });
    assert_eq!(done.encode(), [&b"MLAT\x02\0\0\0\x04\x03\x02\x01"[..], &[0; 16]].concat());
    let failed = FromVmm::Reply(Reply { id: 5, outcome: Err("no".into()) });
    assert_eq!(failed.encode(), b"MLAT\x03\0\0\0\x05\0\0\0no");
    let welcome = ToVmm::Welcome { version: 1 };
    assert_eq!(welcome.encode(), b"MLAT\x10\0\0\0\0\0\0\0\x01\0");
    for (keep, packet) in
        [(false, b"MLAT\x2b\0\0\0\x04\x03\x02\x01"), (true, b"MLAT\x2c\0\0\0\x04\x03\x02\x01")]
    {
        let open = ToVmm::Request { id: 0x0102_0304, request: Request::OpenUserfault { keep } };
        assert_eq!(open.encode(), packet);
    }
}

#[test]
fn an_unknown_run_state_is_named() {
    for run_state in [0, 5, u8::MAX] {
        let mut bytes = FromVmm::Hello(hello()).encode();
        bytes[RUN_STATE] = run_state;
        let unknown = WireError::Unknown { what: "run state of a guest", found: run_state.into() };
        assert_eq!(FromVmm::decode(&bytes), Err(unknown));
    }
}

#[test]
fn a_state_over_the_limit_is_not_loaded() {
    let load = |bytes| ToVmm::Request { id: 1, request: Request::Load { bytes } };
    assert_eq!(ToVmm::decode(&load(MAX_STATE_BYTES).encode()), Ok(load(MAX_STATE_BYTES)));
    let (found, limit) = (MAX_STATE_BYTES + 1, MAX_STATE_BYTES);
    let what = "length of a state";
    assert_eq!(ToVmm::decode(&load(found).encode()), Err(WireError::TooLarge { what, found, limit }));
}

fn hello() -> VmmHello {
    VmmHello { oldest: 1, newest: 1, run_state: RunState::Running, bond: None, shape: shape() }
}
