//! The configuration: one TOML file. An error names the line, the key, the value that was found, and the values that are
//! allowed. `systemd/memlaned.toml` explains all keys.

mod error;
mod parties;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::env;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use memlane_api::units::{Rate, Size, Span};
use memlane_guest::config::{AttachConfig, GuestsConfig, NetworkConfig};
use memlane_guest::toml_file::{FileError, INTERFACE, NAME, Source, Table, Value, or, unique};
use memlane_migrate::config::Limits;
use memlane_net::config::{CONTROL_PORT, LANE_PORT, MAX_LANES, PeerConfig, PortConfig};
use memlane_protocol::wire::Label;
use memlane_tls::{Credentials, CredentialsError, KeyFiles, PeerAuthority};

use crate::api::access::Access;
use parties::{access, attach_users, guest_groups, guest_users};

pub use error::ConfigError;

/// The configuration of the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Name of this host, as its peers know it.
    pub host: Label,
    /// Unix socket of the API.
    pub api_socket: PathBuf,
    /// Who may use the API, and for what.
    pub access: Access,
    /// Unix socket where VMMs attach.
    pub attach_socket: PathBuf,
    /// Directory of the journal.
    pub journal: PathBuf,
    /// Prometheus reads metrics over TCP at this address. They are always on the API's socket as well.
    pub metrics: Option<SocketAddr>,
    /// Peers connect to this address.
    pub control: SocketAddr,
    /// Lanes connect to this TCP port on the address of each migration port.
    pub lane_port: u16,
    /// User ids whose VMMs may attach guests.
    pub attach_users: Vec<u32>,
    /// Limits on what these users' VMMs may use.
    pub attach: AttachConfig,
    /// Network ports lent to migrations.
    pub ports: Vec<PortConfig>,
    /// The keys of this host. If it is `None`, the traffic between daemons is not encrypted.
    pub keys: Option<KeyFiles>,
    /// Hosts that guests may move to and come from.
    pub peers: Vec<PeerConfig>,
    /// Networks that guests are plugged into.
    pub networks: Vec<NetworkConfig>,
    /// Bounds on migrations.
    pub limits: Limits,
    /// QEMU guests that this daemon starts.
    pub guests: GuestsConfig,
}

impl Config {
    /// Reads a configuration file.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be read, or if its contents are not allowed.
    pub fn load(file: &Path) -> Result<Self, ConfigError> {
        let text =
            fs::read_to_string(file).map_err(|error| ConfigError::Read { file: file.to_owned(), error })?;
        Self::parse(file, &text)
    }

    /// Reads the text of a configuration file. The file's name appears in messages.
    ///
    /// # Errors
    ///
    /// Fails if the contents are not allowed.
    pub fn parse(file: &Path, text: &str) -> Result<Self, ConfigError> {
        let mut table = Source { file, text }.table()?;
        let insecure = or(table.take("insecure"), false, |value| value.boolean())?;
        let keys = keys(&mut table)?;
        let guests = guests(&mut table)?;
        let host = host(&mut table)?;
        let config = Self {
            api_socket: socket(&mut table, "api_socket", "/run/memlane/api.sock")?,
            access: access(&mut table)?,
            attach_socket: socket(&mut table, "attach_socket", "/run/memlane/attach.sock")?,
            journal: or(table.take("journal"), PathBuf::from("/var/lib/memlane"), |value| value.path())?,
            metrics: table.take("metrics").map(|value| address(&value, None)).transpose()?,
            control: or(table.take("control"), (Ipv4Addr::UNSPECIFIED, CONTROL_PORT).into(), |value| {
                address(value, Some(CONTROL_PORT))
            })?,
            lane_port: or(table.take("lane_port"), LANE_PORT, |value| {
                value.integer(1..=65535).map(|port| port as u16)
            })?,
            attach_users: attach_users(&mut table, guests.users)?,
            attach: attach(&mut table)?,
            ports: ports(&mut table)?,
            peers: peers(&mut table, &host)?,
            networks: networks(&mut table)?,
            limits: limits(&mut table)?,
            guests,
            keys: (!insecure).then_some(keys),
            host,
        };
        table.finish()?;
        Ok(config)
    }

    /// Reads the keys of this host and the authorities of its peers. Returns `None` if the traffic between daemons is not
    /// encrypted.
    ///
    /// # Errors
    ///
    /// Fails if a file cannot be read, or is not what it should be.
    pub fn credentials(&self) -> Result<Option<Credentials>, CredentialsError> {
        let Some(files) = &self.keys else { return Ok(None) };
        let peers = self.peers.iter();
        let peers: Vec<_> =
            peers.map(|peer| PeerAuthority { name: peer.name.clone(), ca: peer.ca.clone() }).collect();
        Credentials::load(files, &self.host, &peers).map(Some)
    }
}

/// The directory of a host's keys, and the names of the files in it.
const KEYS: &str = "/etc/memlane/keys";
const CERTIFICATE: &str = "host.pem";
const KEY: &str = "host.key";
const CA: &str = "ca.pem";

const PROGRAMS: &str = "a list of paths that begin with /, such as [\"/usr/bin/qemu-system-x86_64\"]";

/// Returns the files of this host's keys. systemd hands them over in a directory of its own, if its unit says so
/// (`LoadCredential=`, systemd.exec(5)).
fn keys(table: &mut Table<'_>) -> Result<KeyFiles, FileError> {
    let handed_over = env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
    let directory = handed_over.filter(|directory| directory.join(KEY).exists());
    let directory = directory.unwrap_or_else(|| PathBuf::from(KEYS));
    let default = KeyFiles {
        certificate: directory.join(CERTIFICATE),
        key: directory.join(KEY),
        ca: directory.join(CA),
    };
    let Some(mut table) = table.table("keys")? else { return Ok(default) };
    let keys = KeyFiles {
        certificate: or(table.take("certificate"), default.certificate, |value| value.path())?,
        key: or(table.take("key"), default.key, |value| value.path())?,
        ca: or(table.take("ca"), default.ca, |value| value.path())?,
    };
    table.finish()?;
    Ok(keys)
}

fn host(table: &mut Table<'_>) -> Result<Label, FileError> {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    match table.take("host") {
        Some(value) => value.label(),
        None => match name.parse() {
            Ok(label) => Ok(label),
            Err(_) => {
                table.need("host", &format!("{NAME} (the machine's own, {name:?}, is none)"))?.parse(NAME)
            }
        },
    }
}

fn socket(table: &mut Table<'_>, key: &'static str, default: &str) -> Result<PathBuf, FileError> {
    or(table.take(key), PathBuf::from(default), |value| {
        let path = value.path()?;
        // sun_path, less the NUL at its end: unix(7).
        if path.as_os_str().len() < 108 { Ok(path) } else { Err(value.wrong("a path of at most 107 bytes")) }
    })
}

fn address(value: &Value<'_>, default_port: Option<u16>) -> Result<SocketAddr, FileError> {
    let (allowed, port) = match default_port {
        None => ("\"ADDRESS:PORT\" with a numeric address, such as \"127.0.0.1:9410\"".to_owned(), 0),
        Some(port) => (format!("\"ADDRESS\" or \"ADDRESS:PORT\", numeric; the default port is {port}"), port),
    };
    let text = value.text(&allowed)?;
    let parsed = text.parse().ok().or_else(|| Some(SocketAddr::new(text.parse().ok()?, port)));
    parsed.filter(|address| address.port() != 0).ok_or_else(|| value.wrong(&allowed))
}

fn attach(table: &mut Table<'_>) -> Result<AttachConfig, FileError> {
    let default = AttachConfig::default();
    let Some(mut table) = table.table("attach")? else { return Ok(default) };
    let number = |value: &Value<'_>| value.integer(1..=1_000_000).map(u64::from);
    let attach = AttachConfig {
        guests_per_user: or(table.take("guests_per_user"), default.guests_per_user, number)?,
        descriptors_per_user: or(table.take("descriptors_per_user"), default.descriptors_per_user, number)?,
        memory_per_user: or(table.take("memory_per_user"), default.memory_per_user, |value| {
            value.parse(Size::ALLOWED)
        })?,
    };
    table.finish()?;
    Ok(attach)
}

fn ports(table: &mut Table<'_>) -> Result<Vec<PortConfig>, FileError> {
    let (mut names, mut addresses) = (HashMap::new(), HashMap::new());
    let read = |mut table: Table<'_>| {
        let name = table.need("name", NAME)?;
        let allowed = "the numeric address of one interface, such as \"192.0.2.11\"";
        let address = table.need("address", allowed)?;
        let port = PortConfig {
            name: unique(&mut names, &name, name.label()?)?,
            interface: table.take("interface").map(|value| value.interface()).transpose()?,
            address: unique(&mut addresses, &address, address.parse::<IpAddr>(allowed)?)?,
            speed: table.take("speed").map(|value| value.parse(Rate::ALLOWED)).transpose()?,
            lanes: or(table.take("lanes"), 1, |value| {
                value.integer(1..=MAX_LANES).map(|lanes| lanes as u16)
            })?,
            congestion_control: table
                .take("congestion_control")
                .map(|value| value.congestion_control())
                .transpose()?,
        };
        if port.address.is_unspecified() || port.address.is_multicast() {
            return Err(address.wrong(allowed));
        }
        table.finish()?;
        Ok(port)
    };
    table.tables("port")?.into_iter().map(read).collect()
}

fn peers(table: &mut Table<'_>, host: &Label) -> Result<Vec<PeerConfig>, FileError> {
    let (mut names, mut addresses) = (HashMap::new(), HashMap::new());
    let read = |mut table: Table<'_>| {
        let name = table.need("name", NAME)?;
        let control = table.need("control", "the \"ADDRESS:PORT\" of its control connection")?;
        let peer = PeerConfig {
            name: unique(&mut names, &name, name.label()?)?,
            control: unique(&mut addresses, &control, address(&control, Some(CONTROL_PORT))?)?,
            may_start_guests: or(table.take("may_start_guests"), false, |value| value.boolean())?,
            ca: table.take("ca").map(|value| value.path()).transpose()?,
        };
        if peer.name == *host {
            return Err(name.wrong("the name of another host; this is our own"));
        }
        table.finish()?;
        Ok(peer)
    };
    table.tables("peer")?.into_iter().map(read).collect()
}

fn networks(table: &mut Table<'_>) -> Result<Vec<NetworkConfig>, FileError> {
    let mut names = HashMap::new();
    let read = |mut table: Table<'_>| {
        let name = table.need("name", NAME)?;
        let network = NetworkConfig {
            name: unique(&mut names, &name, name.label()?)?,
            bridge: table.need("bridge", INTERFACE)?.interface()?,
        };
        table.finish()?;
        Ok(network)
    };
    table.tables("network")?.into_iter().map(read).collect()
}

fn guests(table: &mut Table<'_>) -> Result<GuestsConfig, FileError> {
    let default = GuestsConfig::default();
    let Some(mut table) = table.table("guests")? else { return Ok(default) };
    let guests = GuestsConfig {
        directory: or(table.take("directory"), default.directory, |value| value.path())?,
        memory: or(table.take("memory"), default.memory, |value| value.path())?,
        shim: or(table.take("shim"), default.shim, |value| value.path())?,
        qemu: match table.take("qemu") {
            Some(value) => value.list(PROGRAMS)?.iter().map(Value::path).collect::<Result<_, _>>()?,
            None => default.qemu,
        },
        users: guest_users(&mut table)?,
        groups: table.take("groups").map_or(Ok(default.groups), guest_groups)?,
        starter_socket: socket(&mut table, "starter_socket", "/run/memlane-guest.sock")?,
        starter: or(table.take("starter"), default.starter, |value| value.path())?,
    };
    table.finish()?;
    Ok(guests)
}

fn limits(table: &mut Table<'_>) -> Result<Limits, FileError> {
    let default = Limits::default();
    let Some(mut table) = table.table("limits")? else { return Ok(default) };
    let limits = Limits {
        downtime: or(table.take("downtime"), default.downtime, |value| span(value, 1, 60_000))?,
        min_bandwidth: or(table.take("min_bandwidth"), default.min_bandwidth, |value| {
            value.parse(Rate::ALLOWED)
        })?,
        max_iterations: or(table.take("max_rounds"), default.max_iterations, |value| {
            value.integer(1..=1000)
        })?,
        converge: or(table.take("converge"), default.converge, |value| {
            value.parse("\"stun\", \"postcopy\", \"auto\" or \"none\"")
        })?,
        max_stun: or(table.take("max_stun"), None, |value| {
            value.integer(0..=99).map(|percent| Some(percent as u8))
        })?,
        compression: or(table.take("compression"), default.compression, |value| {
            value.parse("\"auto\" or \"off\"")
        })?,
        patience: or(table.take("patience"), default.patience, |value| span(value, 0, 600_000))?,
        silence: or(table.take("silence"), default.silence, |value| span(value, 100, 600_000))?,
        memory_reserve: or(table.take("memory_reserve"), default.memory_reserve, |value| {
            value.parse(Size::ALLOWED)
        })?,
    };
    table.finish()?;
    Ok(limits)
}

fn span(value: &Value<'_>, from_ms: u64, to_ms: u64) -> Result<Duration, FileError> {
    let (from, to) = (Duration::from_millis(from_ms), Duration::from_millis(to_ms));
    let allowed = format!("{}, from {} to {}", Span::ALLOWED, Span(from), Span(to));
    let Span(found) = value.parse(&allowed)?;
    if (from..=to).contains(&found) { Ok(found) } else { Err(value.wrong(allowed)) }
}
