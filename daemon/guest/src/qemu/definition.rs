//! A guest file says what a QEMU guest is made of, and its QEMU is started from it.
//!
//! An operator writes one for `memlanectl launch`, and it then goes with the guest to hosts that let this one start
//! guests there. The daemon adds what it needs to move the guest, and refuses arguments that would contradict it.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use memlane_api::units::Size;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::control::MAX_DEFINITION_BYTES;
use memlane_protocol::wire::machine::{MAX_NICS, MAX_RAM_BYTES};

use crate::config::GuestsConfig;
use crate::toml_file::{FileError, INTERFACE, NAME, Source, Table, Value, or, unique};

/// A guest file may give this many arguments to QEMU.
pub const MAX_ARGUMENTS: usize = 256;
/// One argument may have this many bytes.
pub const MAX_ARGUMENT: usize = 4 << 10;
/// This is the name of the memory backend. QEMU leaves RAM out of its migration stream by the backend's name, so it is
/// the same at both ends.
pub const BACKEND: &str = "memlane-ram";

/// This is the name of the monitor that the daemon talks to.
const MONITOR: &str = "memlane-monitor";
/// QEMU gives up these system calls before the guest runs: those that are obsolete, that gain rights, that start other
/// programs, and that change its share of the processors. All that the shim does is among those that are left.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// This program is started where a guest file names none.
const DEFAULT_QEMU: &str = "/usr/bin/qemu-system-x86_64";
const MIN_MEMORY: u64 = 1 << 20;
/// QEMU rounds `-m` up to a multiple of this many bytes, and then finds that the backend is smaller.
const MEMORY_UNIT: u64 = 8 << 10;

/// A guest, as its file describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Definition {
    /// This is the name of the guest.
    pub name: Label,
    /// The guest has this many bytes of RAM, a multiple of 8 KiB.
    pub memory: u64,
    /// If this is true, all RAM is taken from the host before the guest starts.
    pub prealloc: bool,
    /// This is the path of the QEMU program.
    pub qemu: PathBuf,
    /// QEMU runs as this user. Without it the daemon chooses one.
    pub user: Option<u32>,
    /// These arguments are given to QEMU in addition to what [`Definition::command_line`] adds.
    pub arguments: Vec<String>,
    /// These are the network interfaces, which are announced after a migration.
    pub nics: Vec<DefinedNic>,
    /// This is the machine type of the guest as it runs elsewhere, in place of what the arguments say: a type without a
    /// version is another machine in each QEMU.
    pub machine: Option<String>,
    /// This is the text of the file, as it travels with the guest.
    pub text: String,
}

/// A `[[nic]]` of a guest file is a network interface of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DefinedNic {
    /// This is the hardware address. It is unicast, and no other NIC of the guest has it.
    pub mac: [u8; 6],
    /// This is a persistent tap device of the host, which is made and joined to its bridge beforehand.
    pub tap: String,
    /// The interface is plugged into this network.
    pub network: Label,
    /// If this is true, the kernel carries the packets (vhost-net), and not QEMU.
    pub vhost: bool,
}

/// QEMU's arguments name what it is given besides the guest file's own arguments in this way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    /// This is the path of the file of its RAM (`mem-path`).
    pub memory: String,
    /// This is the socket of its monitor, at which it is to listen, as an option of `-chardev socket`.
    pub monitor: String,
    /// These are the taps of the NICs, in order, as options of `-netdev tap`.
    pub taps: Vec<String>,
}

impl Given {
    /// QEMU is started with these descriptors, since its user may open none of the files.
    pub fn by_descriptor(memory: RawFd, monitor: RawFd, taps: impl IntoIterator<Item = RawFd>) -> Self {
        Self {
            // QEMU has no option for a descriptor here, but may open the file once more by it.
            memory: format!("/proc/self/fd/{memory}"),
            monitor: format!("fd={monitor}"),
            taps: taps.into_iter().map(|tap| format!("fd={tap}")).collect(),
        }
    }
}

/// A guest cannot be started from a guest file.
#[derive(Debug, thiserror::Error)]
pub enum DefinitionError {
    /// The file is too long.
    #[error("{}: a guest file may have {MAX_DEFINITION_BYTES} bytes at most, and this one has {length}", file.display())]
    TooLong {
        /// This is the file.
        file: PathBuf,
        /// This is its length in bytes.
        length: usize,
    },
    /// The file names too many NICs.
    #[error("{}: a guest may have {MAX_NICS} [[nic]] at most, and this one has {found}", file.display())]
    TooManyNics {
        /// This is the file.
        file: PathBuf,
        /// This many NICs are named.
        found: usize,
    },
    /// Something in the file is not allowed.
    #[error(transparent)]
    Text(#[from] FileError),
    /// The configuration does not allow the program that the file names.
    #[error(
        "the guest file names {}, which may not be started here: guests.qemu in the daemon's configuration \
         allows {allowed}",
        qemu.display()
    )]
    Program {
        /// This is the program that the file names.
        qemu: PathBuf,
        /// These are the programs that may be started.
        allowed: String,
    },
}

impl Definition {
    /// Reads the text of a guest file. `file` is its name, for messages.
    ///
    /// # Errors
    ///
    /// Fails if the file is too long, or if something in it is not allowed.
    pub fn parse(file: &Path, text: &str) -> Result<Self, DefinitionError> {
        if text.len() > MAX_DEFINITION_BYTES {
            return Err(DefinitionError::TooLong { file: file.to_owned(), length: text.len() });
        }
        let mut table = Source { file, text }.table()?;
        let definition = Self {
            name: table.need("name", NAME)?.label()?,
            memory: memory(&table.need("memory", Size::ALLOWED)?)?,
            prealloc: or(table.take("prealloc"), false, |value| value.boolean())?,
            qemu: or(table.take("qemu"), DEFAULT_QEMU.into(), |value| value.path())?,
            user: or(table.take("user"), None, |value| value.integer(1000..=i32::MAX as u32).map(Some))?,
            arguments: table.take("arguments").map_or(Ok(Vec::new()), arguments)?,
            nics: nics(&mut table)?,
            machine: None,
            text: text.to_owned(),
        };
        table.finish()?;
        if definition.nics.len() > MAX_NICS {
            return Err(DefinitionError::TooManyNics { file: file.to_owned(), found: definition.nics.len() });
        }
        Ok(definition)
    }

    /// Has QEMU make this machine, whatever the arguments say. Does nothing if that is no name of a machine type.
    #[must_use]
    pub fn with_machine(mut self, machine: &str) -> Self {
        let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        let is_name =
            machine.starts_with(|c: char| c.is_ascii_alphanumeric()) && machine.chars().all(is_part);
        self.machine = is_name.then(|| machine.to_owned());
        self
    }

    /// Gives QEMU these arguments in place of those that the file has, and the file the same.
    pub(super) fn with_arguments(&self, arguments: Vec<String>) -> Self {
        let table = |nic: &DefinedNic| {
            let mac = nic.mac.map(|byte| format!("{byte:02x}")).join(":");
            let pairs = [("mac", mac), ("tap", nic.tap.clone()), ("network", nic.network.to_string())];
            let mut table: toml::Table =
                pairs.into_iter().map(|(key, text)| (key.to_owned(), text.into())).collect();
            table.insert("vhost".to_owned(), nic.vhost.into());
            toml::Value::Table(table)
        };
        let mut file = toml::Table::new();
        file.insert("name".to_owned(), self.name.to_string().into());
        file.insert("memory".to_owned(), format!("{}B", self.memory).into());
        file.insert("prealloc".to_owned(), self.prealloc.into());
        file.insert("qemu".to_owned(), self.qemu.display().to_string().into());
        if let Some(user) = self.user {
            file.insert("user".to_owned(), i64::from(user).into());
        }
        file.insert("arguments".to_owned(), arguments.clone().into());
        file.insert("nic".to_owned(), self.nics.iter().map(table).collect::<Vec<_>>().into());
        Self { arguments, text: file.to_string(), ..self.clone() }
    }

    /// Refuses a program that this host's configuration does not let guest files name.
    ///
    /// # Errors
    ///
    /// Fails if the program is not among those of the configuration.
    pub fn permitted_by(&self, guests: &GuestsConfig) -> Result<(), DefinitionError> {
        if guests.qemu.contains(&self.qemu) {
            return Ok(());
        }
        let names: Vec<String> = guests.qemu.iter().map(|qemu| qemu.display().to_string()).collect();
        let allowed = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        Err(DefinitionError::Program { qemu: self.qemu.clone(), allowed })
    }

    /// Returns all arguments of QEMU, without the program: those of the file, and what makes its RAM shared, its
    /// monitor reachable and its NICs known. `incoming` makes it wait for a guest.
    pub fn command_line(&self, given: &Given, incoming: bool) -> Vec<String> {
        let mut line = CommandLine::default();
        line.option("-name", format!("guest={},debug-threads=on", self.name));
        line.option("-m", format!("{}B", self.memory));
        let memory = &given.memory;
        let mut backend =
            format!("memory-backend-file,id={BACKEND},share=on,size={},mem-path={memory}", self.memory);
        if self.prealloc {
            backend.push_str(",prealloc=on");
        }
        line.option("-object", backend);
        // Options of this name add up, so the machine's type may stand among the file's arguments.
        line.option("-machine", format!("memory-backend={BACKEND}"));
        let monitor = &given.monitor;
        line.option("-chardev", format!("socket,id={MONITOR},{monitor},server=on,wait=off"));
        line.option("-mon", format!("chardev={MONITOR},mode=control"));
        if !self.has_option("sandbox") {
            line.option("-sandbox", SANDBOX);
        }
        if !["display", "nographic", "vnc", "spice"].iter().any(|name| self.has_option(name)) {
            line.option("-display", "none");
        }
        if incoming {
            line.option("-incoming", "defer");
        }
        line.0.extend(self.arguments.iter().cloned());
        if let Some(machine) = &self.machine {
            // Of two types the last one counts.
            line.option("-machine", machine);
        }
        // Behind the file's devices: the NICs take the slots that those leave free.
        for (number, (nic, tap)) in self.nics.iter().zip(&given.taps).enumerate() {
            // /dev/vhost-net is QEMU's own to open: whoever may use KVM may use it, and the daemon need not.
            let vhost = if nic.vhost { "on" } else { "off" };
            line.option("-netdev", format!("tap,id=memlane-net{number},{tap},vhost={vhost}"));
            let mac = nic.mac.map(|byte| format!("{byte:02x}")).join(":");
            line.option("-device", format!("virtio-net-pci,netdev=memlane-net{number},mac={mac}"));
        }
        line.0
    }

    /// Tells whether the file gives QEMU this option.
    fn has_option(&self, name: &str) -> bool {
        self.arguments.iter().any(|argument| option(argument) == Some(name))
    }
}

#[derive(Default)]
struct CommandLine(Vec<String>);

impl CommandLine {
    fn option(&mut self, name: &str, value: impl Into<String>) {
        self.0.extend([name.into(), value.into()]);
    }
}

fn memory(value: &Value<'_>) -> Result<u64, FileError> {
    let (from, to, unit) = (Size(MIN_MEMORY), Size(MAX_RAM_BYTES), Size(MEMORY_UNIT));
    let allowed = format!("{}, from {from} to {to} in multiples of {unit}", Size::ALLOWED);
    let Size(found) = value.parse(&allowed)?;
    let fits = (MIN_MEMORY..=MAX_RAM_BYTES).contains(&found) && found.is_multiple_of(MEMORY_UNIT);
    if fits { Ok(found) } else { Err(value.wrong(allowed)) }
}

fn arguments(value: Value<'_>) -> Result<Vec<String>, FileError> {
    let allowed = "a list of QEMU's arguments, such as [\"-machine\", \"q35\", \"-smp\", \"2\"]";
    let items = value.list(allowed)?;
    if let Some(item) = items.get(MAX_ARGUMENTS) {
        return Err(item.wrong(format!("{MAX_ARGUMENTS} arguments at most")));
    }
    let mut before = "";
    let mut arguments = Vec::with_capacity(items.len());
    for item in &items {
        let argument = item.text(allowed)?;
        if argument.len() > MAX_ARGUMENT || argument.contains('\0') {
            return Err(item.wrong(format!("texts of {MAX_ARGUMENT} bytes at most, without NUL")));
        }
        if let Some(remedy) = clash(before, argument) {
            return Err(item.wrong(format!("arguments without it: {remedy}")));
        }
        arguments.push(argument.to_owned());
        before = argument;
    }
    Ok(arguments)
}

/// Returns what to do instead, if an argument contradicts what the daemon adds.
fn clash(before: &str, argument: &str) -> Option<&'static str> {
    match option(argument) {
        Some("m") => return Some("memory = \"...\" says how much RAM the guest has"),
        Some("name") => return Some("name = \"...\" names the guest"),
        Some("mem-path") => {
            return Some("the RAM lies where guests.memory in the daemon's configuration says");
        }
        Some("incoming") => return Some("memlanectl launch --incoming makes QEMU wait for a guest"),
        Some("daemonize") => {
            return Some("the daemon starts QEMU in the background, and watches the process");
        }
        Some("runas") => return Some("user = NUMBER says as whom QEMU runs"),
        Some("S" | "preconfig") => return Some("a guest that was launched runs at once"),
        _ => {}
    }
    let of_machine = matches!(option(before), Some("machine" | "M"));
    let backend = of_machine && argument.split(',').any(|part| part.starts_with("memory-backend="));
    backend.then_some("the daemon gives the guest its RAM, so that it can be moved")
}

/// Returns the name of an option, which QEMU takes with one dash or two.
fn option(argument: &str) -> Option<&str> {
    let name = argument.strip_prefix('-')?;
    Some(name.strip_prefix('-').unwrap_or(name))
}

fn nics(table: &mut Table<'_>) -> Result<Vec<DefinedNic>, FileError> {
    let (mut macs, mut taps) = (HashMap::new(), HashMap::new());
    let read = |mut table: Table<'_>| {
        let mac = table.need("mac", MAC)?;
        let tap = table.need("tap", INTERFACE)?;
        let nic = DefinedNic {
            mac: unique(&mut macs, &mac, mac_address(&mac)?)?,
            tap: unique(&mut taps, &tap, tap.interface()?)?,
            network: table.need("network", NAME)?.label()?,
            vhost: or(table.take("vhost"), false, |value| value.boolean())?,
        };
        table.finish()?;
        Ok(nic)
    };
    table.tables("nic")?.into_iter().map(read).collect()
}

const MAC: &str = "a unicast hardware address, such as \"52:54:00:4d:4c:01\"";

fn mac_address(value: &Value<'_>) -> Result<[u8; 6], FileError> {
    unicast_mac(value.text(MAC)?).ok_or_else(|| value.wrong(MAC))
}

/// Reads a hardware address, such as 52:54:00:4d:4c:01. Returns `None` if it is none that a NIC may have.
pub(super) fn unicast_mac(text: &str) -> Option<[u8; 6]> {
    let byte = |part: &str| {
        // from_str_radix() would take a sign as well.
        let digits = part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
        digits.then(|| u8::from_str_radix(part, 16).ok()).flatten()
    };
    let bytes: Vec<u8> = text.split(':').map(byte).collect::<Option<_>>()?;
    <[u8; 6]>::try_from(bytes).ok().filter(|mac| mac[0] & 1 == 0 && *mac != [0; 6])
}
