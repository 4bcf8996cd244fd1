//! What the daemon asks of the starter (`tools/starter`), which starts QEMU as a user of its own.
//!
//! The daemon connects, or starts a starter at the other end of a connection, and sends one [`StartRequest`], with
//! the descriptors that QEMU is to have (`SCM_RIGHTS`). The starter checks it and answers [`READY`], with a socket of
//! its own making, of which the kernel tells the daemon who made it (`SO_PEERCRED`), and over which both go on. The daemon
//! then knows the process that is to become QEMU, and says [`GO`]. The connection ends without a word when QEMU runs in
//! that process. In every other case the starter says why not, in plain text to the end of the connection.

use std::fmt;
use std::str::FromStr;

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::WireError;
use super::reader::{Reader, count, put};

/// The starter sends this byte, and with it a socket that it has made, when it is about to become QEMU.
pub const READY: u8 = 1;
/// The daemon sends this byte when it knows the process.
pub const GO: u8 = 2;
/// A request begins with this many bytes, which say how long it is.
pub const HEADER_BYTES: usize = size_of::<RawHeader>();
/// The first descriptor of a request has this number in QEMU, and the others follow it. It takes QEMU's output as well.
pub const FIRST_DESCRIPTOR: usize = 3;

/// A request may have this many descriptors.
pub const MAX_DESCRIPTORS: usize = 32;
/// A request may name this many groups.
pub const MAX_GROUPS: usize = 32;
/// A request may have this many arguments for QEMU.
pub const MAX_ARGUMENTS: usize = 512;

/// A path or an argument may have this many bytes.
const MAX_TEXT: usize = 8 << 10;
/// A request may have this many bytes behind its header.
const MAX_BODY: u32 = 4 << 20;
const MAGIC: [u8; 4] = *b"MLST";
/// Daemon and starter are installed together, so there is one version.
const VERSION: u16 = 1;

/// The daemon asks for a QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartRequest {
    /// QEMU runs as this user, and as the group of this number.
    pub user: u32,
    /// QEMU is in these groups besides.
    pub groups: Vec<u32>,
    /// So many descriptors come with the request.
    pub descriptors: usize,
    /// This is the path of the program.
    pub program: Vec<u8>,
    /// The shim in QEMU connects to this socket.
    pub attach_socket: Vec<u8>,
    /// These arguments are given to QEMU.
    pub arguments: Vec<Vec<u8>>,
}

impl StartRequest {
    /// Returns the bytes of the request.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        put(
            &mut body,
            &RawRequest {
                user: self.user.into(),
                arguments: count(self.arguments.len(), u16::MAX).into(),
                descriptors: count(self.descriptors, u8::MAX),
                groups: count(self.groups.len(), u8::MAX),
            },
        );
        self.groups.iter().for_each(|group| put(&mut body, &U32::new(*group)));
        for text in [&self.program, &self.attach_socket].into_iter().chain(&self.arguments) {
            put(&mut body, &U16::new(count(text.len(), u16::MAX)));
            put(&mut body, text.as_slice());
        }
        let (version, bytes) = (VERSION.into(), count(body.len(), u32::MAX).into());
        let mut out = Vec::with_capacity(HEADER_BYTES + body.len());
        put(&mut out, &RawHeader { magic: MAGIC, version, bytes });
        out.extend(body);
        out
    }

    /// Returns how many bytes follow the header of a request.
    ///
    /// # Errors
    ///
    /// Returns an error if it is no header of a request, or that of one which is too long.
    pub fn body_bytes(header: &[u8; HEADER_BYTES]) -> Result<usize, WireError> {
        let RawHeader { magic, version, bytes } = Reader::new(header).take("header of a request")?;
        if *magic != MAGIC {
            return Err(WireError::Magic { what: "request for a QEMU", expected: MAGIC, found: *magic });
        }
        if version.get() != VERSION {
            let what = "version of the request for a QEMU; install daemon and starter of one build:";
            return Err(WireError::Unknown { what, found: version.get().into() });
        }
        match bytes.get() {
            bytes @ 0..=MAX_BODY => Ok(bytes as usize),
            bytes => {
                let (found, limit) = (bytes.into(), MAX_BODY.into());
                Err(WireError::TooLarge { what: "length of the request for a QEMU", found, limit })
            }
        }
    }

    /// Reads what follows the header.
    ///
    /// # Errors
    ///
    /// Returns an error if the bytes are not exactly one valid request.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(body);
        let raw: &RawRequest = reader.take("request for a QEMU")?;
        let bounded = |what, found: usize, limit: usize| match found <= limit {
            true => Ok(found),
            false => Err(WireError::TooLarge { what, found: found as u64, limit: limit as u64 }),
        };
        let descriptors = bounded("count of descriptors", raw.descriptors.into(), MAX_DESCRIPTORS)?;
        let arguments = bounded("count of arguments", raw.arguments.get().into(), MAX_ARGUMENTS)?;
        let groups = reader.list::<U32>("count of groups", raw.groups.into(), MAX_GROUPS)?;
        let mut text = |what| {
            let length = reader.take::<U16>(what)?.get();
            reader.bytes(what, length.into(), MAX_TEXT).map(<[u8]>::to_vec)
        };
        let request = Self {
            user: raw.user.get(),
            groups: groups.iter().map(|group| group.get()).collect(),
            descriptors,
            program: text("length of the program's path")?,
            attach_socket: text("length of the socket's path")?,
            arguments: (0..arguments).map(|_| text("length of an argument")).collect::<Result<_, _>>()?,
        };
        reader.end()?;
        Ok(request)
    }
}

/// A range of user ids that belong to nobody but guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestUsers {
    first: u32,
    last: u32,
}

impl GuestUsers {
    /// The words that say what a range is, for messages.
    pub const ALLOWED: &'static str = "\"FIRST-LAST\", user ids from 1000 to 2147483647 of which 65534 is none, such as \
         \"2100000000-2100065535\"";

    /// The lowest user id that may be a guest's: those below are the users of the system and its services.
    const LOWEST: u32 = 1000;
    /// The highest one: file systems and programs are known that take higher ones for negative numbers.
    const HIGHEST: u32 = i32::MAX as u32;
    /// `nobody`, as whom the kernel shows users that it does not know.
    const NOBODY: u32 = 65534;

    /// Returns whether the user is one for guests.
    pub fn contains(&self, user: u32) -> bool {
        (self.first..=self.last).contains(&user)
    }

    /// Returns how many users there are.
    pub fn count(&self) -> u32 {
        self.last - self.first + 1
    }

    /// Returns the user of this number in the range, counted from 0, and from the beginning again after the last.
    pub fn nth(&self, number: u64) -> u32 {
        self.first + (number % u64::from(self.count())) as u32
    }
}

impl Default for GuestUsers {
    /// Returns a range that no other allotment of user ids reaches into. Users of the system and of people are below
    /// 60001; systemd-homed and `DynamicUser=` have 60001 to 65519, systemd-nspawn 524288 to 1879048191 and foreign
    /// images from 2147352576 (systemd's "Users, Groups, UIDs and GIDs"); `useradd` gives out subordinate ids up
    /// to 600100000 (login.defs), Incus and LXD take 1000000 to 1000999999; SSSD and FreeIPA map domains to 200000
    /// to 2000200000.
    fn default() -> Self {
        Self { first: 2_100_000_000, last: 2_100_065_535 }
    }
}

impl FromStr for GuestUsers {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (first, last) = text.split_once('-').ok_or(())?;
        let number = |text: &str| match text.bytes().all(|byte| byte.is_ascii_digit()) {
            true => text.parse::<u32>().map_err(|_| ()),
            false => Err(()),
        };
        let users = Self { first: number(first)?, last: number(last)? };
        let allowed = users.first >= Self::LOWEST && users.last <= Self::HIGHEST && users.first <= users.last;
        if allowed && !users.contains(Self::NOBODY) { Ok(users) } else { Err(()) }
    }
}

impl fmt::Display for GuestUsers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    version: U16,
    bytes: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRequest {
    user: U32,
    arguments: U16,
    descriptors: u8,
    groups: u8,
}
