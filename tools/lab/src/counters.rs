//! Counters of the bytes that a host's interfaces have carried.

use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::host::LabHost;
use crate::remote::Remote;

/// The counters of a host's interfaces, as its kernel keeps them. To read them has no effect on the traffic.
#[derive(Debug)]
pub struct InterfaceCounters {
    from: From,
    text: String,
}

#[derive(Debug)]
enum From {
    /// An open file that shows the namespace in which it was opened, whichever thread reads it.
    Here(File),
    There(Arc<Remote>),
}

/// The bytes that an interface has carried since it was made, headers included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Carried {
    /// The number of bytes that the interface received.
    pub received_bytes: u64,
    /// The number of bytes that the interface sent.
    pub sent_bytes: u64,
}

impl LabHost {
    /// Opens the counters of this host's interfaces.
    ///
    /// # Errors
    ///
    /// If they cannot be opened inside the host.
    pub fn interface_counters(&self) -> Result<InterfaceCounters> {
        let from = match self.remote() {
            Some(remote) => From::There(Arc::clone(remote)),
            None => {
                let file = self.run_in(|| File::open("/proc/thread-self/net/dev"))?;
                let failed = || format!("opening the counters of {}'s interfaces", self.name());
                From::Here(file.with_context(failed)?)
            }
        };
        Ok(InterfaceCounters { from, text: String::new() })
    }
}

impl InterfaceCounters {
    /// Reads what each interface has carried, by its name.
    ///
    /// # Errors
    ///
    /// If the kernel does not tell.
    pub fn read(&mut self) -> Result<impl Iterator<Item = (&str, Carried)>> {
        self.text.clear();
        match &mut self.from {
            From::Here(file) => {
                let read = file.rewind().and_then(|()| file.read_to_string(&mut self.text));
                read.context("reading counters")?;
            }
            From::There(remote) => self.text = remote.read("/proc/net/dev")?,
        }
        Ok(parse(&self.text))
    }
}

/// Parses the lines of `/proc/net/dev`: a name, then 8 numbers about received data, then 8 about sent data.
fn parse(text: &str) -> impl Iterator<Item = (&str, Carried)> {
    text.lines().filter_map(|line| {
        let (name, numbers) = line.split_once(':')?;
        let mut numbers = numbers.split_whitespace().map(str::parse);
        let (received_bytes, sent_bytes) = (numbers.next()?.ok()?, numbers.nth(7)?.ok()?);
        Some((name.trim(), Carried { received_bytes, sent_bytes }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_told_from_headings() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes    packets errs|bytes    packets errs\n\
                    \x20   lo:     120       2    0    0    0     0          0         0      120       2    0    0    0     0       0          0\n\
                    port10:99 1 0 0 0 0 0 0 7 1 0 0 0 0 0 0\n";
        let seen: Vec<_> = parse(text).collect();
        assert_eq!(
            seen,
            [
                ("lo", Carried { received_bytes: 120, sent_bytes: 120 }),
                ("port10", Carried { received_bytes: 99, sent_bytes: 7 }),
            ]
        );
    }
}
