//! Keys for QEMU's own migration with TLS, in the files that QEMU looks for.

use anyhow::Result;
use memlane_keys::{Authority, Validity};
use memlane_lab::{HostId, Lab, LabHost};

/// The name of the object that holds a QEMU's keys.
pub(super) const OBJECT: &str = "tls0";
/// The name in the certificate of the destination, which the source insists on.
pub(super) const DESTINATION: &str = "destination";

/// Writes the keys of both ends to the directories of their hosts.
pub(super) fn write_keys(lab: &Lab) -> Result<()> {
    let authority = Authority::new("perf")?;
    for (id, end, name) in [(HostId::A, "client", "source"), (HostId::B, "server", DESTINATION)] {
        let host = lab.host(id);
        let (certificate, key) = authority.issue(name, Validity::days(1))?;
        for (file, text) in [
            ("ca-cert.pem", authority.certificate()),
            (&format!("{end}-cert.pem"), &certificate),
            (&format!("{end}-key.pem"), &key),
        ] {
            host.write_secret(&host.directory().join(file), text)?;
        }
    }
    Ok(())
}

/// Returns the object with the keys, as QEMU's command line has it.
pub(super) fn object(host: &LabHost, incoming: bool) -> String {
    let endpoint = if incoming { "server" } else { "client" };
    let directory = host.directory().display();
    format!("tls-creds-x509,id={OBJECT},dir={directory},endpoint={endpoint},verify-peer=on")
}
