//! Reading and writing messages field by field.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::WireError;
use super::plain::plain;

/// The bytes of text that a message may carry. A longer text is cut when it is written and refused when it is read.
pub const MAX_TEXT_BYTES: usize = 1024;

/// Reads a message front to back.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Reads one value; `what` names it in errors.
    pub(crate) fn take<T>(&mut self, what: &'static str) -> Result<&'a T, WireError>
    where
        T: FromBytes + KnownLayout + Immutable + Unaligned,
    {
        let short = WireError::Short { what, needed: size_of::<T>(), found: self.rest.len() };
        let (value, rest) = T::ref_from_prefix(self.rest).map_err(|_| short)?;
        self.rest = rest;
        Ok(value)
    }

    /// Reads a list of `count` values. `limit` bounds the count before anything is read.
    pub(crate) fn list<T>(
        &mut self,
        what: &'static str,
        count: u64,
        limit: usize,
    ) -> Result<&'a [T], WireError>
    where
        T: FromBytes + KnownLayout + Immutable + Unaligned,
    {
        if count > limit as u64 {
            return Err(WireError::TooLarge { what, found: count, limit: limit as u64 });
        }
        let needed = count as usize * size_of::<T>();
        let short = WireError::Short { what, needed, found: self.rest.len() };
        let (values, rest) =
            <[T]>::ref_from_prefix_with_elems(self.rest, count as usize).map_err(|_| short)?;
        self.rest = rest;
        Ok(values)
    }

    /// Reads `count` bytes, at most `limit`.
    pub(crate) fn bytes(
        &mut self,
        what: &'static str,
        count: u64,
        limit: usize,
    ) -> Result<&'a [u8], WireError> {
        self.list::<u8>(what, count, limit)
    }

    /// Reads text to the end of the message, and makes it [`plain`]. A text that becomes longer by that is cut, so that a
    /// message can carry it on.
    pub(crate) fn text(&mut self, what: &'static str) -> Result<String, WireError> {
        let bytes = self.bytes(what, self.rest.len() as u64, MAX_TEXT_BYTES)?;
        let text = std::str::from_utf8(bytes).map_err(|_| WireError::Text(what))?;
        Ok(cut(&plain(text)).to_owned())
    }

    /// Checks that the message ends here.
    pub(crate) fn end(self) -> Result<(), WireError> {
        match self.rest.len() {
            0 => Ok(()),
            more => Err(WireError::Trailing(more)),
        }
    }
}

/// Appends a value.
pub(crate) fn put<T: IntoBytes + Immutable + ?Sized>(out: &mut Vec<u8>, value: &T) {
    out.extend_from_slice(value.as_bytes());
}

/// Returns a number of values for a field whose largest value is `most`.
///
/// A number that the field cannot hold becomes `most`, which is above every limit, so that a reader refuses the message
/// with the count in place of taking it for a shorter one.
pub(crate) fn count<T: TryFrom<usize>>(values: usize, most: T) -> T {
    T::try_from(values).unwrap_or(most)
}

/// Appends `text`, cut to what a reader accepts.
pub(crate) fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(cut(text).as_bytes());
}

/// Returns the beginning of a text that fits a message, up to a boundary of characters.
fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_TEXT_BYTES)]
}
