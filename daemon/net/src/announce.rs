//! This module tells the switches where a guest has gone. It sends RARP frames with the guest's Ethernet address on the
//! bridge of its network, several of them and further and further apart, as QEMU does.

use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;
use std::time::Duration;

use socket2::{Domain, Socket, Type};
use tokio::sync::oneshot;
use tracing::{info, warn};

/// This many frames are sent for each address.
const FRAMES: u32 = 5;
/// This is the time between the first and the second frame.
const FIRST_GAP: Duration = Duration::from_millis(50);
/// Each gap is this much longer than the one before.
const GAP_STEP: Duration = Duration::from_millis(100);
/// No gap is longer than this.
const LONGEST_GAP: Duration = Duration::from_millis(550);

const ETH_P_RARP: u16 = 0x8035;

/// The first frames are waited for this long: a guest that is about to run sends frames of its own soon.
const FIRST_FRAMES: Duration = Duration::from_millis(100);

/// Announces `macs` on `bridge`. The first frames are sent when this returns. A thread sends the others later, because
/// opening and closing such a socket may have to wait for the kernel. A missing bridge is only logged, since the guest
/// belongs to this host already. `sent` is called for each frame.
pub async fn announce(guest: String, bridge: String, macs: Vec<[u8; 6]>, sent: fn()) {
    let (begun, first_sent) = oneshot::channel();
    let name = guest.clone();
    let thread = std::thread::Builder::new().name("announce".into()).spawn(move || {
        match send_all(&guest, &bridge, &macs, begun, sent) {
            Ok(()) => info!(guest, bridge, rounds = FRAMES, "announced the guest's new place"),
            Err(error) => {
                warn!(guest, bridge, %error, "cannot announce the guest; switches learn its place from its traffic")
            }
        }
    });
    if let Err(error) = thread {
        warn!(guest = name, %error, "cannot start a thread that announces the guest");
    }
    let _ = tokio::time::timeout(FIRST_FRAMES, first_sent).await;
}

/// Sends all frames, and reports through `begun` when the first is sent.
fn send_all(
    guest: &str,
    bridge: &str,
    macs: &[[u8; 6]],
    begun: oneshot::Sender<()>,
    sent: fn(),
) -> io::Result<()> {
    let socket = open(bridge)?;
    let (mut begun, mut gap) = (Some(begun), FIRST_GAP);
    for number in 0..FRAMES {
        if number > 0 {
            std::thread::sleep(gap);
            gap = (gap + GAP_STEP).min(LONGEST_GAP);
        }
        for mac in macs {
            match socket.send(&frame(mac)) {
                Ok(_) => sent(),
                Err(error) => warn!(guest, %error, "cannot send an announcement"),
            }
        }
        // The task that waits for it may have given up.
        let _ = begun.take().map(|begun| begun.send(()));
    }
    Ok(())
}

/// Returns a RARP request (RFC 903) by which `mac` asks for its own protocol address, padded to the least length of an
/// Ethernet frame.
pub fn frame(mac: &[u8; 6]) -> [u8; 60] {
    let mut frame = [0; 60];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(mac);
    frame[12..14].copy_from_slice(&ETH_P_RARP.to_be_bytes());
    frame[14..16].copy_from_slice(&1u16.to_be_bytes()); // Ethernet
    frame[16..18].copy_from_slice(&0x0800u16.to_be_bytes()); // IPv4
    (frame[18], frame[19]) = (6, 4); // lengths of both kinds of address
    frame[20..22].copy_from_slice(&3u16.to_be_bytes()); // request reverse
    frame[22..28].copy_from_slice(mac);
    frame[32..38].copy_from_slice(mac);
    frame
}

/// Opens a packet socket that is bound to the bridge, which needs `CAP_NET_RAW`.
fn open(bridge: &str) -> io::Result<Socket> {
    let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
    let index = rustix::net::netdevice::name_to_index(&socket, bridge)?;
    // Neither socket2 nor rustix has addresses of packet sockets.
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: ETH_P_RARP.to_be(),
        sll_ifindex: index as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: the address is of the length given.
    match unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) } {
        0 => Ok(socket),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_frame_is_a_rarp_request_from_and_about_the_guest() {
        let mac = [0x52, 0x54, 0, 1, 2, 3];
        let frame = super::frame(&mac);
        assert_eq!(frame[..14], [255, 255, 255, 255, 255, 255, 0x52, 0x54, 0, 1, 2, 3, 0x80, 0x35]);
        assert_eq!(frame[14..22], [0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!((&frame[22..28], &frame[32..38]), (&mac[..], &mac[..]));
    }
}
