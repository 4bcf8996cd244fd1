//! The configuration file of a lab's daemon.

use anyhow::Result;
use memlane_keys::{Authority, CA, CERTIFICATE, KEY, Validity};

use crate::host::LabHost;
use crate::programs::Programs;
use crate::user::DaemonUser;

/// The certificates of a lab's daemons are valid for so many days.
const DAYS: u64 = 1;

/// The settings that both daemons of a lab have in common.
pub(super) struct DaemonConfig {
    /// Keys that are added before the tables.
    pub(super) keys: String,
    /// Tables that are added at the end.
    pub(super) tables: String,
    /// The authority of both daemons' certificates; without one, nothing is encrypted.
    pub(super) authority: Option<Authority>,
    /// Whether each daemon starts QEMU for guests that the other one sends.
    pub(super) may_start_guests: bool,
    /// The rate of each port as the configuration writes it, if it is known.
    pub(super) port_speed: Option<String>,
}

impl DaemonConfig {
    /// Makes the keys of the daemon of `host`, if it encrypts.
    pub(super) fn write_keys(&self, host: &LabHost, user: &DaemonUser) -> Result<()> {
        let Some(authority) = &self.authority else { return Ok(()) };
        let (certificate, key) = authority.issue(host.name(), Validity::days(DAYS))?;
        for (name, text) in
            [(CERTIFICATE, &certificate), (KEY, &key), (CA, &authority.certificate().to_owned())]
        {
            let path = host.directory().join(name);
            host.write_secret(&path, text)?;
            user.give(host, &path)?;
        }
        Ok(())
    }

    /// Returns the configuration of the daemon of `host`, whose peer is the daemon of `peer`.
    pub(super) fn text(&self, programs: &Programs, host: &LabHost, peer: &LabHost) -> String {
        let directory = host.directory().display();
        let mut text = format!(
            "{insecure}host = \"{name}\"\ncontrol = \"{control}\"\n\
             api_socket = \"{directory}/api.sock\"\nattach_socket = \"{directory}/attach.sock\"\n\
             journal = \"{directory}/journal\"\nmetrics = \"127.0.0.1:9410\"\n{keys}\n\
             [guests]\ndirectory = \"{directory}/guests\"\nmemory = \"{memory}\"\nshim = \"{shim}\"\n\
             qemu = [\"{qemu}\"]\nstarter = \"{starter}\"\n\
             starter_socket = \"{directory}/starter.sock\"\n\
             [keys]\ncertificate = \"{directory}/{CERTIFICATE}\"\nkey = \"{directory}/{KEY}\"\n\
             ca = \"{directory}/{CA}\"\n\
             [[peer]]\nname = \"{peer}\"\ncontrol = \"{peer_control}\"\n\
             may_start_guests = {may_start_guests}\n",
            insecure = if self.authority.is_none() { "insecure = true\n" } else { "" },
            name = host.name(),
            control = host.control_address(),
            keys = self.keys,
            memory = host.memory_directory().display(),
            shim = host.program(programs, "libmemlane_shim.so").display(),
            qemu = host.qemu().display(),
            starter = host.program(programs, "memlane-starter").display(),
            may_start_guests = self.may_start_guests,
            peer = peer.name(),
            peer_control = peer.control_address(),
        );
        // Daemons pair ports by their names, and the interfaces of hosts that are there already may differ in theirs.
        for (number, port) in host.ports().iter().enumerate() {
            let (interface, address) = (&port.interface, port.address);
            text += &format!(
                "[[port]]\nname = \"port{number}\"\ninterface = \"{interface}\"\naddress = \"{address}\"\n"
            );
            if let Some(speed) = &self.port_speed {
                text += &format!("speed = \"{speed}\"\n");
            }
        }
        if let Some(bridge) = host.bridge() {
            text += &format!("[[network]]\nname = \"lan\"\nbridge = \"{}\"\n", bridge.interface);
        }
        text + &self.tables
    }
}
