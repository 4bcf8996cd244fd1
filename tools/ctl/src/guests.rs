//! Commands that start QEMU guests, take over running ones, and release them.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use memlane_api::client::Client;
use memlane_api::types::{Attach, ErrorCode, GuestInfo, Launch, Standing};
use memlane_protocol::wire::control::MAX_DEFINITION_BYTES;

use crate::args::AttachArgs;
use crate::exit::{Error, Exit};
use crate::{libvirt, show};

/// Starts a guest from a guest file.
pub(crate) async fn launch(
    client: &Client,
    file: &Path,
    incoming: bool,
    as_json: bool,
) -> Result<Exit, Error> {
    let definition = read(file).map_err(|error| {
        Error::Command(ErrorCode::Invalid, format!("cannot read the guest file {}: {error}", file.display()))
    })?;
    let guest = client.launch(&Launch { definition, incoming }).await?;
    tell(&guest, if guest.standing == Standing::Incoming { WAITS } else { "runs" }, as_json);
    Ok(Exit::Completed)
}

/// Takes over a guest that another program started.
pub(crate) async fn attach(client: &Client, which: &AttachArgs, as_json: bool) -> Result<Exit, Error> {
    let AttachArgs { qmp, libvirt, name, incoming } = which;
    let (name, qmp) = match (libvirt, name) {
        (Some(domain), name) => {
            let domain = libvirt::monitor_of(domain)?;
            (name.clone().unwrap_or(domain.name), domain.monitor)
        }
        (None, Some(name)) => {
            let of_wrapper = || Path::new(MONITORS).join(format!("{name}.sock"));
            (name.clone(), qmp.clone().unwrap_or_else(of_wrapper))
        }
        (None, None) => {
            return Err(Error::Command(ErrorCode::Invalid, "name the guest: --name or --libvirt".to_owned()));
        }
    };
    let invalid = |why: String| {
        Error::Command(ErrorCode::Invalid, format!("cannot use the monitor {}: {why}", qmp.display()))
    };
    // The daemon has a working directory of its own.
    let absolute = std::path::absolute(&qmp).map_err(|error| invalid(error.to_string()))?;
    let qmp = absolute.to_str().ok_or_else(|| invalid("the path is not UTF-8".to_owned()))?;
    let order = Attach { name, qmp: qmp.to_owned(), incoming: *incoming };
    let guest = client.attach(&order).await?;
    tell(&guest, if guest.standing == Standing::Incoming { WAITS } else { "is attached" }, as_json);
    Ok(Exit::Completed)
}

/// Releases a guest.
pub(crate) async fn detach(client: &Client, name: &str, as_json: bool) -> Result<Exit, Error> {
    let guest = client.detach(name).await?;
    tell(&guest, "was let go and goes on without the daemon", as_json);
    Ok(Exit::Completed)
}

/// memlane-qemu makes the sockets of monitors here.
pub(crate) const MONITORS: &str = "/run/memlane-qemu";
const WAITS: &str = "waits to arrive from another host";

fn tell(guest: &GuestInfo, what: &str, as_json: bool) {
    match as_json {
        true => show::json(guest),
        false => show::line(&format!("{} {what}\n{}", guest.name, show::vmm(guest))),
    }
}

/// Reads a file, but no more of it than the daemon would take.
fn read(file: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(file)?.take(MAX_DEFINITION_BYTES as u64 + 1).read_to_string(&mut text)?;
    match text.len() <= MAX_DEFINITION_BYTES {
        true => Ok(text),
        false => Err(io::Error::other(format!(
            "it has more than {MAX_DEFINITION_BYTES} bytes, which is too long for a guest file"
        ))),
    }
}
