//! What QEMU and the daemon talk to, and is not what it seems: a monitor of an older QEMU, and devices in other
//! processes.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use serde_json::{Value, json};

/// Listens at `path` for one client, which it connects to the monitor at `qmp`; in the greeting it changes the version.
pub(crate) fn older_monitor(path: &Path, qmp: &Path, version: [u32; 3]) {
    let listener = UnixListener::bind(path).unwrap();
    let qmp = UnixStream::connect(qmp).unwrap();
    thread::spawn(move || -> io::Result<()> {
        let (client, _) = listener.accept()?;
        let mut from_qmp = BufReader::new(qmp.try_clone()?);
        let mut greeting = String::new();
        from_qmp.read_line(&mut greeting)?;
        let mut greeting: Value = serde_json::from_str(&greeting)?;
        let [major, minor, micro] = version;
        greeting["QMP"]["version"]["qemu"] = json!({ "major": major, "minor": minor, "micro": micro });
        let mut to_client = client.try_clone()?;
        writeln!(to_client, "{greeting}")?;
        let back = thread::spawn(move || io::copy(&mut from_qmp, &mut to_client));
        io::copy(&mut &client, &mut &qmp)?;
        // The client is gone; QEMU may talk to the next one.
        qmp.shutdown(std::net::Shutdown::Both)?;
        let _ = back.join();
        Ok(())
    });
}

/// Listens at `path` as a vhost-user back end for as many devices as connect: one that can do nothing, and answers
/// what it is asked for (QEMU's `docs/interop/vhost-user.rst`).
pub(crate) fn vhost_user(path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        while let Ok((device, _)) = listener.accept() {
            // It ends with the connection.
            thread::spawn(move || answer(device));
        }
    });
}

fn answer(mut device: UnixStream) -> io::Result<()> {
    const GET_FEATURES: u32 = 1;
    const GET_PROTOCOL_FEATURES: u32 = 15;
    /// VIRTIO_F_VERSION_1 and VHOST_USER_F_PROTOCOL_FEATURES. There are none of the latter, so that nothing else is
    /// asked that would have an answer.
    const FEATURES: u64 = 1 << 32 | 1 << 30;
    /// Version 1, and a reply.
    const FLAGS: u32 = 1 | 1 << 2;
    loop {
        let mut header = [0; 12];
        device.read_exact(&mut header)?;
        let number =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        // Descriptors that come along are closed by the kernel, as this reads none.
        io::copy(&mut (&mut device).take(number(8).into()), &mut io::sink())?;
        let request = number(0);
        let value = match request {
            GET_FEATURES => FEATURES,
            GET_PROTOCOL_FEATURES => 0,
            _ => continue,
        };
        let reply = [request, FLAGS, size_of_val(&value) as u32].map(u32::to_le_bytes);
        device.write_all(&[reply.as_flattened(), &value.to_le_bytes()].concat())?;
    }
}
