//! This module takes a TOML table apart key by key, so that every complaint can name the file, the line, the key, what
//! stands there and what may stand there.

mod error;

use std::collections::HashMap;
use std::fmt::Display;
use std::hash::Hash;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use memlane_protocol::wire::Label;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

pub use error::FileError;

/// This tells operators what a name may be.
pub const NAME: &str = "a name of 1 to 63 characters of A-Z a-z 0-9 . _ -, beginning with a letter or digit";
/// This tells operators what a network interface may be called.
pub const INTERFACE: &str = "the name of a network interface: 1 to 15 characters without spaces and slashes";

/// A file being read.
#[derive(Clone, Copy)]
pub struct Source<'t> {
    /// This is the file's name, for messages.
    pub file: &'t Path,
    /// This is the text of the file.
    pub text: &'t str,
}

/// A table of which keys are taken until [`Table::finish`] finds none left.
pub struct Table<'t> {
    source: Source<'t>,
    name: &'static str,
    line: usize,
    entries: DeTable<'t>,
    known: Vec<&'static str>,
}

/// A value stands at a key.
pub struct Value<'t> {
    source: Source<'t>,
    key: String,
    line: usize,
    found: &'t str,
    value: DeValue<'t>,
}

impl<'t> Source<'t> {
    /// Reads the file as a table.
    ///
    /// # Errors
    ///
    /// Fails if it is no TOML.
    pub fn table(self) -> Result<Table<'t>, FileError> {
        match DeTable::parse(self.text) {
            Ok(entries) => Ok(Table {
                source: self,
                name: "",
                line: 1,
                entries: entries.into_inner(),
                known: Vec::new(),
            }),
            Err(error) => Err(FileError::Syntax {
                file: self.file.to_owned(),
                line: self.line(error.span().map_or(0, |span| span.start)),
                message: error.message().to_owned(),
            }),
        }
    }

    fn line(self, offset: usize) -> usize {
        1 + self.text.bytes().take(offset).filter(|byte| *byte == b'\n').count()
    }
}

impl<'t> Table<'t> {
    /// Takes the value that stands at `key`, if one does.
    pub fn take(&mut self, key: &'static str) -> Option<Value<'t>> {
        self.known.push(key);
        let value = self.entries.remove(key)?;
        Some(Value::new(self.source, self.path(key), value))
    }

    /// Takes the value that stands at `key`, which has no default.
    ///
    /// # Errors
    ///
    /// Fails if there is none. The error says that it is to be what is `allowed`.
    pub fn need(&mut self, key: &'static str, allowed: &str) -> Result<Value<'t>, FileError> {
        self.take(key).ok_or_else(|| FileError::Missing {
            file: self.source.file.to_owned(),
            line: self.line,
            key: self.path(key),
            allowed: allowed.to_owned(),
        })
    }

    /// Takes a table that may be left out.
    ///
    /// # Errors
    ///
    /// Fails if something other than a table stands there.
    pub fn table(&mut self, key: &'static str) -> Result<Option<Table<'t>>, FileError> {
        self.take(key).map(|value| value.table(key)).transpose()
    }

    /// Takes the tables of `[[key]]`, in order.
    ///
    /// # Errors
    ///
    /// Fails if something other than tables stands there.
    pub fn tables(&mut self, key: &'static str) -> Result<Vec<Table<'t>>, FileError> {
        let Some(value) = self.take(key) else { return Ok(Vec::new()) };
        let allowed = format!("one or more tables, each begun by [[{key}]]");
        value.list(&allowed)?.into_iter().map(|value| value.table(key)).collect()
    }

    /// Refuses keys that were not taken.
    ///
    /// # Errors
    ///
    /// Fails if there is one.
    pub fn finish(self) -> Result<(), FileError> {
        match self.entries.iter().map(|(key, _)| key).min_by_key(|key| key.span().start) {
            None => Ok(()),
            Some(key) => Err(FileError::Unknown {
                file: self.source.file.to_owned(),
                line: self.source.line(key.span().start),
                key: self.path(&shown(key.get_ref())),
                known: self.known.join(", "),
            }),
        }
    }

    fn path(&self, key: &str) -> String {
        match self.name {
            "" => key.to_owned(),
            name => format!("{name}.{key}"),
        }
    }
}

impl<'t> Value<'t> {
    fn new(source: Source<'t>, key: String, value: Spanned<DeValue<'t>>) -> Self {
        let span = value.span();
        // The first line is enough to recognise a table or a list by.
        let found = source.text.get(span.clone()).and_then(|text| text.lines().next()).unwrap_or("");
        Self { source, key, line: source.line(span.start), found, value: value.into_inner() }
    }

    /// Returns the line that the value stands on, counted from 1.
    pub fn line(&self) -> usize {
        self.line
    }

    /// Returns the complaint that the value is not what is allowed.
    pub fn wrong(&self, allowed: impl Display) -> FileError {
        FileError::Value {
            file: self.source.file.to_owned(),
            line: self.line,
            key: self.key.clone(),
            found: shown(self.found),
            allowed: allowed.to_string(),
        }
    }

    /// Returns the complaint that the same value stands on an earlier line, `first`.
    pub fn twice(&self, first: usize) -> FileError {
        FileError::Duplicate {
            file: self.source.file.to_owned(),
            line: self.line,
            key: self.key.clone(),
            found: shown(self.found),
            first,
        }
    }

    /// Reads true or false.
    ///
    /// # Errors
    ///
    /// Fails if it is neither.
    pub fn boolean(&self) -> Result<bool, FileError> {
        self.value.as_bool().ok_or_else(|| self.wrong("true or false"))
    }

    /// Reads a whole number in a range.
    ///
    /// # Errors
    ///
    /// Fails if it is none, or outside the range.
    pub fn integer(&self, range: RangeInclusive<u32>) -> Result<u32, FileError> {
        self.number()
            .filter(|number| range.contains(number))
            .ok_or_else(|| self.wrong(format!("a whole number from {} to {}", range.start(), range.end())))
    }

    /// Reads a whole number. Returns `None` if it is none.
    pub fn number(&self) -> Option<u32> {
        let integer = self.value.as_integer()?;
        u32::from_str_radix(integer.as_str(), integer.radix()).ok()
    }

    /// Reads a text.
    ///
    /// # Errors
    ///
    /// Fails if it is none.
    pub fn text(&self, allowed: &str) -> Result<&str, FileError> {
        self.value.as_str().ok_or_else(|| self.wrong(allowed))
    }

    /// Reads a text that is parsed as `T`.
    ///
    /// # Errors
    ///
    /// Fails if it is none, or has no meaning.
    pub fn parse<T: FromStr>(&self, allowed: &str) -> Result<T, FileError> {
        self.text(allowed)?.parse().map_err(|_| self.wrong(allowed))
    }

    /// Reads the name of a guest, host, port or network.
    ///
    /// # Errors
    ///
    /// Fails if it is none.
    pub fn label(&self) -> Result<Label, FileError> {
        self.parse(NAME)
    }

    /// Reads the name of a network interface.
    ///
    /// # Errors
    ///
    /// Fails if it is none.
    pub fn interface(&self) -> Result<String, FileError> {
        let name = self.text(INTERFACE)?;
        // dev_valid_name() in the kernel's net/core/dev.c.
        let valid = (1..16).contains(&name.len())
            && !matches!(name, "." | "..")
            && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control());
        if valid { Ok(name.to_owned()) } else { Err(self.wrong(INTERFACE)) }
    }

    /// Reads the name of a congestion control of TCP.
    ///
    /// # Errors
    ///
    /// Fails if it is none.
    pub fn congestion_control(&self) -> Result<String, FileError> {
        let allowed =
            "a congestion control that net.ipv4.tcp_allowed_congestion_control lists, such as \"cubic\"";
        let name = self.text(allowed)?;
        // TCP_CA_NAME_MAX in the kernel's include/net/tcp.h, with a zero at the end.
        let valid = (1..16).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic());
        if valid { Ok(name.to_owned()) } else { Err(self.wrong(allowed)) }
    }

    /// Reads a path from the root.
    ///
    /// # Errors
    ///
    /// Fails if it is none.
    pub fn path(&self) -> Result<PathBuf, FileError> {
        let allowed = "a path that begins with /";
        let path = Path::new(self.text(allowed)?);
        if path.is_absolute() { Ok(path.to_owned()) } else { Err(self.wrong(allowed)) }
    }

    /// Reads a list.
    ///
    /// # Errors
    ///
    /// Fails if it is none.
    pub fn list(self, allowed: &str) -> Result<Vec<Value<'t>>, FileError> {
        match self.value {
            DeValue::Array(items) => {
                Ok(items.into_iter().map(|item| Self::new(self.source, self.key.clone(), item)).collect())
            }
            _ => Err(self.wrong(allowed)),
        }
    }

    fn table(self, name: &'static str) -> Result<Table<'t>, FileError> {
        match self.value {
            DeValue::Table(entries) => {
                Ok(Table { source: self.source, name, line: self.line, entries, known: Vec::new() })
            }
            _ => Err(self.wrong("a table")),
        }
    }
}

/// Returns as much of a text of the file as a complaint shows.
fn shown(text: &str) -> String {
    const SHOWN: usize = 120;
    text.chars().take(SHOWN).collect()
}

/// Returns what a value says, or the default where there is no value.
///
/// # Errors
///
/// Fails if `read` does.
pub fn or<'t, T>(
    value: Option<Value<'t>>,
    default: T,
    read: impl FnOnce(&Value<'t>) -> Result<T, FileError>,
) -> Result<T, FileError> {
    value.map_or(Ok(default), |value| read(&value))
}

/// Refuses what stood on an earlier line. `seen` remembers the lines.
///
/// # Errors
///
/// Fails if it stood on one.
pub fn unique<T: Clone + Eq + Hash>(
    seen: &mut HashMap<T, usize>,
    value: &Value<'_>,
    parsed: T,
) -> Result<T, FileError> {
    match seen.insert(parsed.clone(), value.line()) {
        None => Ok(parsed),
        Some(first) => Err(value.twice(first)),
    }
}
