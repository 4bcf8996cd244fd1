//! The bytes that a machine state travels as: a list of sections, each with a tag, a number and a payload.

use std::collections::BTreeMap;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::error::StateError;

/// The version of the format. States of other versions are refused.
pub const VERSION: u16 = 1;

const MAGIC: [u8; 4] = *b"MLST";
const MAX_SECTIONS: usize = 1 << 16;

/// Writes a machine state section by section.
#[derive(Debug)]
pub struct SectionWriter(Vec<u8>);

impl SectionWriter {
    /// Begins a state that has no sections yet.
    #[expect(clippy::new_without_default, reason = "a default state would be a surprise")]
    pub fn new() -> Self {
        let header = RawHeader { magic: MAGIC, version: VERSION, reserved: 0 };
        Self(header.as_bytes().to_vec())
    }

    /// Appends a section: `tag` says what `value` is, and `index` which of several it is (which vCPU, which chip).
    ///
    /// # Panics
    ///
    /// A section has less than 4 GiB.
    pub fn put<T: IntoBytes + Immutable + ?Sized>(&mut self, tag: u16, index: u16, value: &T) {
        let payload = value.as_bytes();
        let bytes = u32::try_from(payload.len()).expect("a section has less than 4 GiB");
        let section = RawSection { tag, index, bytes };
        self.0.extend_from_slice(section.as_bytes());
        self.0.extend_from_slice(payload);
    }

    /// Returns the bytes of the whole state.
    pub fn finish(self) -> Vec<u8> {
        self.0
    }
}

/// The sections of a machine state, each of which is taken once.
#[derive(Debug)]
pub struct Sections<'a>(BTreeMap<(u16, u16), &'a [u8]>);

impl<'a> Sections<'a> {
    /// Splits the bytes of a state into its sections.
    ///
    /// # Errors
    ///
    /// [`StateError`] if the bytes are no state of this [`VERSION`], or are damaged.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, StateError> {
        let (header, mut rest) =
            RawHeader::read_from_prefix(bytes).map_err(|_| StateError::Short("its header"))?;
        if header.magic != MAGIC {
            return Err(StateError::Magic(header.magic));
        }
        if header.version != VERSION {
            return Err(StateError::Version { found: header.version, expected: VERSION });
        }
        let mut sections = BTreeMap::new();
        while !rest.is_empty() {
            let (section, after) = RawSection::read_from_prefix(rest)
                .map_err(|_| StateError::Short("the header of a section"))?;
            let RawSection { tag, index, bytes } = section;
            let (payload, after) =
                after.split_at_checked(bytes as usize).ok_or(StateError::Short("a section"))?;
            if sections.insert((tag, index), payload).is_some() {
                return Err(StateError::Twice { tag, index });
            }
            if sections.len() > MAX_SECTIONS {
                return Err(StateError::TooMany("sections in the machine state"));
            }
            rest = after;
        }
        Ok(Self(sections))
    }

    /// Takes a section's bytes; `what` names them in errors.
    ///
    /// # Errors
    ///
    /// [`StateError::Missing`].
    pub fn bytes(&mut self, tag: u16, index: u16, what: &'static str) -> Result<&'a [u8], StateError> {
        self.0.remove(&(tag, index)).ok_or(StateError::Missing { what, index })
    }

    /// Takes a section that is one structure; `what` names it in errors.
    ///
    /// # Errors
    ///
    /// [`StateError::Missing`], and [`StateError::Length`] if it has not exactly the structure's length.
    pub fn take<T: FromBytes>(&mut self, tag: u16, index: u16, what: &'static str) -> Result<T, StateError> {
        self.maybe(tag, index, what)?.ok_or(StateError::Missing { what, index })
    }

    /// Takes a section that is one structure, if the state has it; `what` names it in errors.
    ///
    /// # Errors
    ///
    /// [`StateError::Length`] if it has not exactly the structure's length.
    pub fn maybe<T: FromBytes>(
        &mut self,
        tag: u16,
        index: u16,
        what: &'static str,
    ) -> Result<Option<T>, StateError> {
        let Some(payload) = self.0.remove(&(tag, index)) else { return Ok(None) };
        let (found, expected) = (payload.len(), size_of::<T>());
        T::read_from_bytes(payload).map(Some).map_err(|_| StateError::Length { what, found, expected })
    }

    /// Takes a section that is a list of at most `most` structures; `what` names them in errors.
    ///
    /// # Errors
    ///
    /// [`StateError::Missing`], [`StateError::Length`] if it is no whole number of structures, and
    /// [`StateError::TooMany`].
    pub fn list<T: FromBytes>(
        &mut self,
        tag: u16,
        index: u16,
        most: usize,
        what: &'static str,
    ) -> Result<Vec<T>, StateError> {
        let payload = self.bytes(tag, index, what)?;
        let (found, expected) = (payload.len(), size_of::<T>());
        if !found.is_multiple_of(expected) {
            return Err(StateError::Length { what, found, expected });
        }
        if found / expected > most {
            return Err(StateError::TooMany(what));
        }
        let items = payload.chunks_exact(expected).map(T::read_from_bytes);
        items.collect::<Result<_, _>>().map_err(|_| StateError::Length { what, found, expected })
    }

    /// Checks that all sections were taken.
    ///
    /// # Errors
    ///
    /// [`StateError::Unknown`] names one that was not.
    pub fn end(self) -> Result<(), StateError> {
        match self.0.keys().next() {
            Some(&(tag, index)) => Err(StateError::Unknown { tag, index }),
            None => Ok(()),
        }
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    version: u16,
    reserved: u16,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawSection {
    tag: u16,
    index: u16,
    bytes: u32,
}
