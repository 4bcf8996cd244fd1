//! The offer of a guest, and the answers to it.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use zerocopy::byteorder::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::qemu::QemuGuest;
use crate::wire::attach::MigrationId;
use crate::wire::error::WireError;
use crate::wire::hello::Token;
use crate::wire::machine::GuestShape;
use crate::wire::reader::{MAX_TEXT_BYTES, Reader, count, put, put_text};
use crate::wire::text::{Label, RawLabel};

/// The largest number of ports that one host may offer for a migration.
pub const MAX_PORTS: usize = 64;
/// The largest number of reasons for which a guest is refused.
pub const MAX_REFUSALS: usize = 64;

/// The offer of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The identity of the migration from now on.
    pub migration: MigrationId,
    /// Whether the source only asks, and nothing is to be reserved.
    pub check_only: bool,
    /// The number of bytes of RAM that hold data. The rest are holes.
    pub data_bytes: u64,
    /// The description of the guest.
    pub shape: GuestShape,
    /// What else a destination must know of a guest whose VMM is stock QEMU.
    pub qemu: Option<Box<QemuGuest>>,
}

/// What the destination has reserved for a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accept {
    /// The token that each lane must show to be accepted.
    pub token: Token,
    /// The ports to which lanes may connect.
    pub ports: Vec<Port>,
}

/// A port of the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// The name of the port at the destination.
    pub name: Label,
    /// The address at which it listens.
    pub address: SocketAddr,
    /// A migration begins with no more lanes than this.
    pub lanes: u16,
}

/// The reason why a destination refuses a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The kind of the reason.
    pub what: RefusalKind,
    /// A text that says what is wrong and what to do about it.
    pub reason: String,
}

/// The kind of reason why a destination refuses a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RefusalKind {
    /// No VMM waits for this guest.
    Receiver = 1,
    /// The processor, the interrupt controller or the clock differ.
    Machine = 2,
    /// There is not enough memory, or its layout differs.
    Memory = 3,
    /// No port can be used.
    Port = 4,
    /// A network of the guest is not there.
    Network = 5,
    /// The guest is being migrated already, or is at the destination already.
    Busy = 6,
    /// The ports cannot carry what is asked.
    Bandwidth = 7,
    /// Something else is wrong at the destination.
    Host = 8,
    /// A disk of the guest is not there.
    Disk = 9,
}

impl RefusalKind {
    /// All kinds.
    pub const ALL: [Self; 9] = [
        Self::Receiver,
        Self::Machine,
        Self::Memory,
        Self::Port,
        Self::Network,
        Self::Busy,
        Self::Bandwidth,
        Self::Host,
        Self::Disk,
    ];

    /// Returns one word for logs, metrics and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Receiver => "receiver",
            Self::Machine => "machine",
            Self::Memory => "memory",
            Self::Port => "port",
            Self::Network => "network",
            Self::Busy => "busy",
            Self::Bandwidth => "bandwidth",
            Self::Host => "host",
            Self::Disk => "disk",
        }
    }
}

/// An offer says so that it has a guest in QEMU of which it says what that is made of.
const WITH_PARTS: u8 = 2;

impl Offer {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        put(
            out,
            &RawOffer {
                migration: self.migration,
                check_only: self.check_only.into(),
                qemu: self.qemu.as_ref().map_or(0, |qemu| if qemu.parts.is_empty() { 1 } else { WITH_PARTS }),
                reserved: [0; 6],
                data_bytes: self.data_bytes.into(),
            },
        );
        self.shape.encode(out);
        if let Some(qemu) = &self.qemu {
            qemu.encode(out);
        }
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let raw: &RawOffer = reader.take("offer")?;
        Ok(Self {
            migration: raw.migration,
            check_only: raw.check_only != 0,
            data_bytes: raw.data_bytes.get(),
            shape: GuestShape::decode(reader)?,
            qemu: match raw.qemu {
                0 => None,
                kind => Some(Box::new(QemuGuest::decode(reader, kind == WITH_PARTS)?)),
            },
        })
    }
}

impl Accept {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        put(out, &self.token);
        put(out, &U16::new(count(self.ports.len(), u16::MAX)));
        for port in &self.ports {
            put(out, &RawPort::from(port));
        }
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let token = *reader.take("lane token")?;
        let count = reader.take::<U16>("count of ports")?.get();
        let ports = reader.list::<RawPort>("count of ports", count.into(), MAX_PORTS)?;
        let ports = ports.iter().map(RawPort::port).collect::<Result<_, _>>()?;
        Ok(Self { token, ports })
    }
}

pub(super) fn encode_refusals(refusals: &[Refusal], out: &mut Vec<u8>) {
    put(out, &U16::new(count(refusals.len(), u16::MAX)));
    for refusal in refusals {
        let mut text = Vec::new();
        put_text(&mut text, &refusal.reason);
        let bytes = U16::new(count(text.len(), u16::MAX));
        put(out, &RawRefusal { what: refusal.what as u8, reserved: 0, bytes });
        out.extend_from_slice(&text);
    }
}

pub(super) fn decode_refusals(reader: &mut Reader<'_>) -> Result<Vec<Refusal>, WireError> {
    let count = usize::from(reader.take::<U16>("count of refusals")?.get());
    if count > MAX_REFUSALS {
        let (found, limit) = (count as u64, MAX_REFUSALS as u64);
        return Err(WireError::TooLarge { what: "count of refusals", found, limit });
    }
    let mut refusals = Vec::with_capacity(count);
    for _ in 0..count {
        let raw: &RawRefusal = reader.take("refusal")?;
        let unknown = WireError::Unknown { what: "kind of a refusal", found: raw.what.into() };
        let what = RefusalKind::ALL.into_iter().find(|kind| *kind as u8 == raw.what).ok_or(unknown)?;
        let text = reader.bytes("reason of a refusal", raw.bytes.get().into(), MAX_TEXT_BYTES)?;
        let reason = Reader::new(text).text("reason of a refusal")?;
        refusals.push(Refusal { what, reason });
    }
    Ok(refusals)
}

/// Returns an address as it travels. An IPv4 address is mapped to IPv6.
pub(super) fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// Reads an address as it travels.
pub(super) fn address_of(octets: [u8; 16]) -> IpAddr {
    Ipv6Addr::from(octets).to_canonical()
}

impl From<&Port> for RawPort {
    fn from(port: &Port) -> Self {
        Self {
            name: port.name.raw(),
            address: octets(port.address.ip()),
            port: port.address.port().into(),
            lanes: port.lanes.into(),
        }
    }
}

impl RawPort {
    fn port(&self) -> Result<Port, WireError> {
        Ok(Port {
            name: self.name.label()?,
            address: SocketAddr::new(address_of(self.address), self.port.get()),
            lanes: self.lanes.get(),
        })
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawOffer {
    migration: MigrationId,
    check_only: u8,
    qemu: u8,
    reserved: [u8; 6],
    data_bytes: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawPort {
    name: RawLabel,
    address: [u8; 16],
    port: U16,
    lanes: U16,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRefusal {
    what: u8,
    reserved: u8,
    bytes: U16,
}
