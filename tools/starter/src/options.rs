//! The command line. It is root's, and says what the daemon may ask for.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use memlane_protocol::wire::starter::GuestUsers;

pub(crate) const USAGE: &str =
    "usage: memlane-starter --users FIRST-LAST --shim PATH --qemu PATH... [--group GROUP]...

Starts a QEMU for memlaned, which is at the other end of standard input, and becomes that QEMU.
systemd starts it by memlane-guest.socket; a memlaned that is root starts it by itself.

  --users FIRST-LAST  user ids that belong to guests: guests.users of the daemon's configuration
  --shim PATH         library that is loaded into QEMU: guests.shim
  --qemu PATH         a program that may be started; may be given several times: guests.qemu
  --group GROUP       a group (name or number) that QEMU may be in; may be given several times:
                      guests.groups. A name that this host does not have is left out
  --help, --version";

/// The daemon may ask for this.
#[derive(Debug)]
pub(crate) struct Options {
    /// QEMU may run as these users.
    pub users: GuestUsers,
    /// QEMU may be in these groups.
    pub groups: Vec<u32>,
    /// These are the paths of programs that may be started.
    pub programs: Vec<Vec<u8>>,
    /// This library is loaded into QEMU.
    pub shim: PathBuf,
}

/// The command line says this.
#[derive(Debug)]
pub(crate) enum Parsed {
    /// QEMU is to be started with these options.
    Options(Options),
    /// The user wants to read this text.
    Told(String),
}

impl Options {
    /// Reads the arguments that follow the program's name.
    ///
    /// # Errors
    ///
    /// Fails, and says why, if they make no sense.
    pub(crate) fn parse(mut words: impl Iterator<Item = OsString>) -> Result<Parsed, String> {
        let (mut users, mut shim, mut groups, mut programs) = (None, None, Vec::new(), Vec::new());
        while let Some(word) = words.next() {
            let name = word.to_string_lossy().into_owned();
            match name.as_str() {
                "--help" | "-h" => return Ok(Parsed::Told(USAGE.into())),
                "--version" | "-V" => {
                    return Ok(Parsed::Told(concat!("memlane-starter ", env!("CARGO_PKG_VERSION")).into()));
                }
                "--users" | "--shim" | "--qemu" | "--group" => {}
                _ => return Err(format!("unknown argument {name}")),
            }
            let value = words.next().ok_or_else(|| format!("{name} needs a value"))?;
            match name.as_str() {
                "--users" => {
                    let range = value.to_str().and_then(|text| text.parse().ok());
                    users = Some(range.ok_or_else(|| format!("--users takes {}", GuestUsers::ALLOWED))?);
                }
                "--shim" => shim = Some(PathBuf::from(value)),
                "--qemu" => programs.push(value.into_vec()),
                _ => groups.extend(group(&value.to_string_lossy())),
            }
        }
        let missing = |name| format!("{name} is missing");
        Ok(Parsed::Options(Self {
            users: users.ok_or_else(|| missing("--users"))?,
            shim: shim.ok_or_else(|| missing("--shim"))?,
            groups,
            programs,
        }))
    }
}

/// Returns the number of a group of this host.
fn group(name: &str) -> Option<u32> {
    if let Ok(number) = name.parse() {
        return Some(number);
    }
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let fields = groups.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let mut found = fields.filter(|fields| fields.len() > 2 && fields[0] == name);
    found.next().and_then(|fields| fields[2].parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Parsed, String> {
        Options::parse(line.split_whitespace().map(Into::into))
    }

    #[test]
    fn all_options_are_read() {
        let line =
            "--users 2000-2999 --shim /s.so --qemu /q --qemu /r --group root --group 104 --group absent-1";
        let Ok(Parsed::Options(options)) = parse(line) else { panic!("it is right") };
        assert_eq!((options.groups, options.programs), (vec![0, 104], vec![b"/q".to_vec(), b"/r".to_vec()]));
        assert_eq!(options.shim, PathBuf::from("/s.so"));
        assert!(options.users.contains(2999) && !options.users.contains(0));
    }

    #[test]
    fn what_is_wrong_is_told() {
        for (line, why) in [
            ("--users 0-2999 --shim /s.so", "--users takes"),
            ("--shim /s.so --qemu /q", "--users is missing"),
            ("--users 2000-2999", "--shim is missing"),
            ("--users", "--users needs a value"),
            ("--uid 7", "unknown argument --uid"),
        ] {
            assert!(parse(line).is_err_and(|told| told.contains(why)), "{line}");
        }
        assert!(matches!(parse("--help"), Ok(Parsed::Told(text)) if text.contains("--users FIRST-LAST")));
        assert!(matches!(parse("--version"), Ok(Parsed::Told(_))));
    }
}
