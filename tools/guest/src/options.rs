//! The parameters on the kernel's command line:
//!
//! | parameter | meaning | default |
//! | --- | --- | --- |
//! | `memlane.address=10.78.0.2/24` | address of `eth0` | must be given |
//! | `memlane.memory=512M` | memory that is written and checked, in bytes or with K, M or G | 64M |
//! | `memlane.checkers=2` | threads that do it | 1 |
//! | `memlane.rate=2000` | pages that they write a second, all together | 2000 |
//! | `memlane.disks=vda,vdb` | disks that are read all the time, past the page cache | none |

use std::fs;
use std::net::Ipv4Addr;

use crate::pattern::PAGE_BYTES;

/// The parameters that the guest was started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BootOptions {
    /// The address of `eth0`.
    pub address: Ipv4Addr,
    /// Length of the network's prefix, in bits.
    pub prefix: u8,
    /// The size of the memory that is written and checked, in bytes.
    pub memory_bytes: u64,
    /// The number of threads that write and check memory.
    pub checkers: u64,
    /// The number of pages that all threads together write in a second.
    pub rate: u64,
    /// The disks that are read all the time.
    pub disks: Vec<String>,
}

impl BootOptions {
    /// Reads the command line. /proc must be mounted.
    pub(crate) fn read() -> Result<Self, String> {
        let line =
            fs::read_to_string("/proc/cmdline").map_err(|error| format!("reading /proc/cmdline: {error}"))?;
        Self::parse(&line)
    }

    /// Makes parameters for the tests of other modules.
    #[cfg(test)]
    pub(crate) fn for_test(memory_bytes: u64, checkers: u64, rate: u64) -> Self {
        Self { address: Ipv4Addr::LOCALHOST, prefix: 8, memory_bytes, checkers, rate, disks: Vec::new() }
    }

    fn parse(line: &str) -> Result<Self, String> {
        let value = |key: &str| {
            line.split_whitespace()
                .filter_map(|word| word.strip_prefix("memlane."))
                .filter_map(|word| word.split_once('='))
                .rfind(|(found, _)| *found == key)
                .map(|(_, value)| value)
        };
        let wrong = |key: &str, allowed: &str| {
            format!("memlane.{key}= on the kernel's command line must be {allowed}")
        };
        let number = |key: &str, default: u64| match value(key) {
            None => Ok(default),
            Some(text) => bytes(text).ok_or_else(|| wrong(key, "a number, K, M or G behind it")),
        };
        let (address, prefix) = value("address")
            .and_then(|text| text.split_once('/'))
            .and_then(|(address, prefix)| Some((address.parse().ok()?, prefix.parse().ok()?)))
            .filter(|(_, prefix)| *prefix <= 32)
            .ok_or_else(|| wrong("address", "an address and a prefix, such as 10.78.0.2/24"))?;
        let options = Self {
            address,
            prefix,
            memory_bytes: number("memory", 64 << 20)?,
            checkers: number("checkers", 1)?,
            rate: number("rate", 2000)?,
            disks: value("disks").into_iter().flat_map(|disks| disks.split(',')).map(str::to_owned).collect(),
        };
        if !(1..=256).contains(&options.checkers) {
            return Err(wrong("checkers", "1 to 256"));
        }
        if options.memory_bytes / PAGE_BYTES < options.checkers {
            return Err(wrong("memory", "a page for each checker, at least"));
        }
        Ok(options)
    }
}

pub(crate) fn bytes(text: &str) -> Option<u64> {
    let (digits, shift) = match text.char_indices().last()? {
        (end, 'K') => (&text[..end], 10),
        (end, 'M') => (&text[..end], 20),
        (end, 'G') => (&text[..end], 30),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_read_among_the_kernels_own_words() {
        let line = "console=ttyS0 memlane.address=10.78.0.2/24 quiet memlane.memory=3M memlane.checkers=2 memlane.disks=vda,vdb\n";
        let found = BootOptions::parse(line).unwrap();
        let expected = BootOptions {
            address: Ipv4Addr::new(10, 78, 0, 2),
            prefix: 24,
            memory_bytes: 3 << 20,
            checkers: 2,
            rate: 2000,
            disks: vec!["vda".into(), "vdb".into()],
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn nonsense_is_refused_with_its_key() {
        for (words, key) in [
            ("", "memlane.address="),
            ("memlane.address=10.78.0.2", "memlane.address="),
            ("memlane.address=10.78.0.2/33", "memlane.address="),
            ("memlane.address=10.78.0.2/24 memlane.memory=x", "memlane.memory="),
            ("memlane.address=10.78.0.2/24 memlane.memory=99999999999G", "memlane.memory="),
            ("memlane.address=10.78.0.2/24 memlane.memory=4K memlane.checkers=2", "memlane.memory="),
            ("memlane.address=10.78.0.2/24 memlane.checkers=0", "memlane.checkers="),
        ] {
            let error = BootOptions::parse(words).unwrap_err();
            assert!(error.contains(key), "{words}: {error}");
        }
    }
}
