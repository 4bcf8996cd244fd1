//! What holds for every decoder, and below it what is particular to one.
//!
//! [`Codec`] brings the decoders under one hat; [`properties!`] checks each with valid values,
//! with valid messages that are cut, lengthened or damaged, and with bytes out of nowhere.

mod attach;
mod control;
mod frame;
mod hello;
mod machine;
mod starter;
mod strategies;
mod text;

use std::fmt::Debug;

use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

use super::attach::{FromVmm, Reply, ToVmm};
use super::control::{Control, HEADER_BYTES, QemuGuest, decode_header};
use super::frame::{Ack, PageRequest};
use super::hello::{Answer, Hello};
use super::machine::GuestShape;
use super::reader::{Reader, put};
use super::starter::{self as wire_starter, StartRequest};
use super::text::RawLabel;
use super::{Label, WireError};

/// A message, with its encoder and its decoder.
trait Codec: Sized + PartialEq + Debug {
    fn write(&self) -> Vec<u8>;
    fn read(bytes: &[u8]) -> Result<Self, WireError>;

    /// The text that goes on to the end of the message, where there is one: then the end is not
    /// known from the bytes before it.
    fn open_text(&self) -> Option<&str> {
        None
    }

    /// Bytes of memory that the value holds besides its own.
    fn heap_bytes(&self) -> usize {
        0
    }
}

fn round_trips<T: Codec>(value: &T) -> TestCaseResult {
    let read = T::read(&value.write());
    prop_assert_eq!(read.as_ref(), Ok(value));
    Ok(())
}

/// Bytes that are any at all: an error, or a value like those that are sent.
fn survives<T: Codec>(bytes: &[u8]) -> TestCaseResult {
    if let Ok(value) = T::read(bytes) {
        // A refusal takes 4 bytes of a message and 32 of memory; nothing grows more than that.
        let (held, most) = (value.heap_bytes(), 8 * bytes.len() + 256);
        prop_assert!(held <= most, "{} bytes made {value:?}, which holds {held}", bytes.len());
        round_trips(&value)?;
    }
    Ok(())
}

fn refuses_to_be_cut<T: Codec>(value: &T) -> TestCaseResult {
    let bytes = value.write();
    let text = value.open_text().unwrap_or("");
    for length in 0..bytes.len() {
        if let Ok(cut) = T::read(&bytes[..length]) {
            // Only the text may have become shorter.
            let left = (length + text.len()).checked_sub(bytes.len());
            let want = left.and_then(|left| text.get(..left));
            prop_assert!(want.is_some(), "{length} of {} bytes made {cut:?}", bytes.len());
            prop_assert_eq!(cut.open_text(), want);
        }
    }
    Ok(())
}

fn refuses_more<T: Codec>(value: &T, more: &[u8]) -> TestCaseResult {
    let mut bytes = value.write();
    bytes.extend(more);
    match value.open_text() {
        None => prop_assert_eq!(T::read(&bytes), Err(WireError::Trailing(more.len()))),
        Some(_) => survives::<T>(&bytes)?,
    }
    Ok(())
}

fn survives_flips<T: Codec>(value: &T, mask: u8) -> TestCaseResult {
    let mut bytes = value.write();
    for at in 0..bytes.len() {
        bytes[at] ^= mask;
        survives::<T>(&bytes)?;
        bytes[at] ^= mask;
    }
    Ok(())
}

macro_rules! properties {
    ($($name:ident: $message:ty = $values:expr;)*) => {$(
        mod $name {
            use super::*;

            proptest! {
                #![proptest_config(ProptestConfig::with_cases(64))]

                #[test]
                fn comes_back_as_it_was(value in $values) {
                    round_trips::<$message>(&value)?;
                }

                #[test]
                fn is_an_error_when_cut(value in $values) {
                    refuses_to_be_cut::<$message>(&value)?;
                }

                #[test]
                fn is_an_error_with_more_behind_it(
                    value in $values,
                    more in prop::collection::vec(any::<u8>(), 1..40),
                ) {
                    refuses_more::<$message>(&value, &more)?;
                }

                #[test]
                fn may_have_a_wrong_byte(value in $values, mask in 1..=u8::MAX) {
                    survives_flips::<$message>(&value, mask)?;
                }

                #[test]
                fn may_have_a_wrong_piece(
                    value in $values,
                    at in any::<prop::sample::Index>(),
                    gone in 0..24usize,
                    instead in prop::collection::vec(any::<u8>(), 0..24),
                ) {
                    let mut bytes = value.write();
                    let start = at.index(bytes.len() + 1);
                    let end = (start + gone).min(bytes.len());
                    bytes.splice(start..end, instead);
                    survives::<$message>(&bytes)?;
                }

                #[test]
                fn may_be_anything(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
                    survives::<$message>(&bytes)?;
                }
            }
        }
    )*};
}

properties! {
    a_label: Label = strategies::label();
    a_guest: GuestShape = strategies::guest_shape();
    a_packet_from_a_vmm: FromVmm = strategies::from_vmm();
    a_packet_to_a_vmm: ToVmm = strategies::to_vmm();
    a_hello: Hello = strategies::hello();
    an_answer: Answer = strategies::answer();
    a_control_message: Control = strategies::control();
    an_acknowledgement: Ack = strategies::ack();
    a_request_for_a_qemu: StartRequest = strategies::start_request();
    a_page_request: PageRequest = strategies::page_request().prop_map(|(_, request)| request);
}

impl Codec for Label {
    fn write(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put(&mut out, &self.raw());
        out
    }

    fn read(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        let raw: &RawLabel = reader.take("label")?;
        reader.end()?;
        Ok(raw.label()?)
    }

    fn heap_bytes(&self) -> usize {
        self.as_str().len()
    }
}

impl Codec for GuestShape {
    fn write(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.encode(&mut out);
        out
    }

    fn read(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        let shape = Self::decode(&mut reader)?;
        reader.end()?;
        Ok(shape)
    }

    fn heap_bytes(&self) -> usize {
        let names = self.name.heap_bytes() + self.machine.vmm.heap_bytes();
        let networks: usize = self.nics.iter().map(|nic| nic.network.heap_bytes()).sum();
        let machine = capacity(&self.machine.cpuid) + capacity(&self.machine.msrs);
        names + networks + machine + capacity(&self.regions) + capacity(&self.nics)
    }
}

impl Codec for FromVmm {
    fn write(&self) -> Vec<u8> {
        self.encode()
    }

    fn read(bytes: &[u8]) -> Result<Self, WireError> {
        Self::decode(bytes)
    }

    fn open_text(&self) -> Option<&str> {
        match self {
            Self::Reply(Reply { outcome: Err(reason), .. }) => Some(reason),
            _ => None,
        }
    }

    fn heap_bytes(&self) -> usize {
        match self {
            Self::Hello(hello) => hello.shape.heap_bytes(),
            Self::Shim { .. } => 0,
            Self::Reply(_) => self.open_text().map_or(0, str::len),
        }
    }
}

impl Codec for ToVmm {
    fn write(&self) -> Vec<u8> {
        self.encode()
    }

    fn read(bytes: &[u8]) -> Result<Self, WireError> {
        Self::decode(bytes)
    }

    fn open_text(&self) -> Option<&str> {
        match self {
            Self::Refused { reason } => Some(reason),
            _ => None,
        }
    }

    fn heap_bytes(&self) -> usize {
        self.open_text().map_or(0, str::len)
    }
}

impl Codec for StartRequest {
    fn write(&self) -> Vec<u8> {
        self.encode()
    }

    fn read(bytes: &[u8]) -> Result<Self, WireError> {
        let short = |what, needed, found| WireError::Short { what, needed, found };
        let split = bytes.split_first_chunk::<{ wire_starter::HEADER_BYTES }>();
        let (header, body) = split.ok_or(short("header", wire_starter::HEADER_BYTES, bytes.len()))?;
        let length = Self::body_bytes(header)?;
        match body.len().checked_sub(length) {
            Some(0) => Self::decode(body),
            Some(more) => Err(WireError::Trailing(more)),
            None => Err(short("body", length, body.len())),
        }
    }

    fn heap_bytes(&self) -> usize {
        // The arguments' own bytes; how many there may be is bounded besides.
        let texts = [&self.program, &self.attach_socket].into_iter().chain(&self.arguments);
        capacity(&self.groups) + texts.map(Vec::len).sum::<usize>()
    }
}

impl Codec for Hello {
    fn write(&self) -> Vec<u8> {
        self.encode()
    }

    fn read(bytes: &[u8]) -> Result<Self, WireError> {
        Self::decode(bytes)
    }

    fn heap_bytes(&self) -> usize {
        self.host.heap_bytes()
    }
}

impl Codec for Answer {
    fn write(&self) -> Vec<u8> {
        self.encode()
    }

    fn read(bytes: &[u8]) -> Result<Self, WireError> {
        Self::decode(bytes)
    }

    fn heap_bytes(&self) -> usize {
        match self {
            Self::Welcome { .. } => 0,
            Self::Refused { reason } => reason.capacity(),
        }
    }
}

/// The header's length is left to the reader of the connection; here all that follows the
/// header is the body, so that bodies of wrong lengths are tried too.
impl Codec for Control {
    fn write(&self) -> Vec<u8> {
        let bytes = self.encode();
        let (_, length) = decode_header(&bytes[..HEADER_BYTES]).unwrap();
        assert_eq!(length, bytes.len() - HEADER_BYTES);
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Self, WireError> {
        let (header, body) = bytes.split_at(HEADER_BYTES.min(bytes.len()));
        Self::decode(decode_header(header)?.0, body)
    }

    fn open_text(&self) -> Option<&str> {
        match self {
            Self::Handover { reason, .. } => Some(reason),
            _ => None,
        }
    }

    fn heap_bytes(&self) -> usize {
        match self {
            Self::LanesFrom(addresses) => capacity(addresses),
            Self::Offer(offer) => {
                let texts = offer.qemu.iter().flat_map(|qemu| {
                    let QemuGuest { machine, cpu, accelerator, disks, definition, parts } = &**qemu;
                    [machine, cpu, accelerator, definition].into_iter().chain(disks).chain(parts)
                });
                offer.shape.heap_bytes() + texts.map(|text| size_of::<String>() + text.len()).sum::<usize>()
            }
            Self::Accept(accept) => {
                let names: usize = accept.ports.iter().map(|port| port.name.heap_bytes()).sum();
                names + capacity(&accept.ports)
            }
            Self::Refuse(refusals) => {
                let reasons: usize = refusals.iter().map(|refusal| refusal.reason.capacity()).sum();
                reasons + capacity(refusals)
            }
            Self::Holes(ranges) => capacity(ranges),
            Self::Digests { digests, .. } => capacity(digests),
            Self::State { bytes, .. } => bytes.capacity(),
            Self::Missing(missing) => capacity(&missing.words),
            Self::Handover { reason, .. } => reason.capacity(),
            _ => 0,
        }
    }
}

impl Codec for Ack {
    fn write(&self) -> Vec<u8> {
        self.encode().to_vec()
    }

    fn read(bytes: &[u8]) -> Result<Self, WireError> {
        Self::decode(bytes)
    }
}

/// The guest has as many pages as there can be; that a page lies within a smaller one is tested with the frames.
impl Codec for PageRequest {
    fn write(&self) -> Vec<u8> {
        self.encode().to_vec()
    }

    fn read(bytes: &[u8]) -> Result<Self, WireError> {
        Self::decode(bytes, u64::MAX)
    }
}

fn capacity<T>(values: &Vec<T>) -> usize {
    values.capacity() * size_of::<T>()
}
