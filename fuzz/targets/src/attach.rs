//! The packets between the daemon and a VMM.

use memlane_protocol::wire::attach::{
    FromVmm, MAX_PACKET_BYTES, MAX_STATE_BYTES, Reply, Request, ToVmm, VmmHello,
};
use memlane_protocol::wire::machine::{GuestShape, MAX_RAM_BYTES, MAX_VCPUS};

use crate::text::check_plain;

/// Reads a packet as the daemon does, and as a VMM does.
pub fn attach(packet: &[u8]) {
    if let Ok(message) = FromVmm::decode(packet) {
        match &message {
            FromVmm::Hello(VmmHello { shape, .. }) => check_shape(shape),
            FromVmm::Reply(Reply { outcome: Err(reason), .. }) => check_plain(reason),
            FromVmm::Reply(_) | FromVmm::Shim { .. } => {}
        }
        let encoded = message.encode();
        assert!(encoded.len() <= MAX_PACKET_BYTES, "{} bytes", encoded.len());
        assert_eq!(FromVmm::decode(&encoded), Ok(message));
        assert!(ToVmm::decode(packet).is_err(), "no packet goes in both directions");
    }
    if let Ok(message) = ToVmm::decode(packet) {
        match &message {
            ToVmm::Refused { reason } => check_plain(reason),
            ToVmm::Request { request: Request::Load { bytes }, .. } => assert!(*bytes <= MAX_STATE_BYTES),
            ToVmm::Request { .. } | ToVmm::Welcome { .. } => {}
        }
        let encoded = message.encode();
        assert!(encoded.len() <= MAX_PACKET_BYTES, "{} bytes", encoded.len());
        assert_eq!(ToVmm::decode(&encoded), Ok(message));
    }
}

/// The pages of a guest can be numbered: regions are whole pages, in order, apart, and not too many.
fn check_shape(shape: &GuestShape) {
    assert!((1..=MAX_VCPUS).contains(&shape.machine.vcpus));
    assert!(!shape.regions.is_empty());
    let (mut free_from, mut total) = (0, 0);
    for region in &shape.regions {
        let page = u64::from(region.page_bytes);
        assert!([region.address, region.bytes, region.offset].iter().all(|field| field % page == 0));
        assert!(region.address >= free_from && region.bytes > 0, "{region:?}");
        free_from = region.address.checked_add(region.bytes).expect("no region ends behind all addresses");
        region.offset.checked_add(region.bytes).expect("nor behind all offsets");
        total += region.bytes;
    }
    assert!(total <= MAX_RAM_BYTES);
}
