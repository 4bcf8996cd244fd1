//! `memlane-starter` starts QEMU for the daemon as a user of its own, in a process of its own.
//!
//! systemd runs one for each connection to `memlane-guest.socket` (`systemd/memlane-guest@.service`), and a daemon that
//! is root runs one by itself. It is root for as long as it takes to check one request: whatever a daemon that was taken over
//! may ask, what comes of it is a program that the command line allows, as a user and in groups that the command line
//! allows. [`memlane_protocol::wire::starter`] describes the conversation.

mod become_guest;
mod connection;
mod options;

use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use memlane_protocol::wire::starter::StartRequest;
use rustix::process::geteuid;

use connection::{Connection, ConnectionError};
use options::{Options, Parsed, USAGE};

/// QEMU was not started.
#[derive(Debug, thiserror::Error)]
enum StartError {
    /// This program has not the rights that it needs.
    #[error("memlane-starter is not root, and so cannot start QEMU as another user")]
    NotRoot,
    /// The conversation with the daemon broke off.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// The daemon asks for what is not allowed.
    #[error("{what} is not allowed by {option} of memlane-starter (see memlane-guest@.service): {found}")]
    Forbidden {
        /// This is what was asked for.
        what: &'static str,
        /// This option says what is allowed.
        option: &'static str,
        /// This is what the request says.
        found: String,
    },
    /// Another number of descriptors came than the request says.
    #[error("{found} descriptors came with the request, which says {said}")]
    Descriptors {
        /// So many came.
        found: usize,
        /// So many should have come.
        said: usize,
    },
    /// The kernel does not let this process become the guest's user.
    #[error("cannot {doing} for user {user}: {source}")]
    Become {
        /// This was being done.
        doing: &'static str,
        /// This is the guest's user.
        user: u32,
        /// This is what the kernel said.
        source: std::io::Error,
    },
}

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args_os().skip(1)) {
        Ok(Parsed::Options(options)) => options,
        Ok(Parsed::Told(text)) => {
            println!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("memlane-starter: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let mut connection = match Connection::from_stdin() {
        Ok(connection) => connection,
        Err(error) => {
            eprintln!("memlane-starter: {error}");
            return ExitCode::from(2);
        }
    };
    let Err(error) = serve(&mut connection, &options);
    eprintln!("memlane-starter: {error}");
    connection.say(&error.to_string());
    ExitCode::FAILURE
}

/// Becomes the QEMU that the daemon asks for.
fn serve(connection: &mut Connection, options: &Options) -> Result<Infallible, StartError> {
    if !geteuid().is_root() {
        return Err(StartError::NotRoot);
    }
    let (request, descriptors) = connection.receive()?;
    check(&request, &descriptors, options)?;
    connection.introduce()?;
    become_guest::run(request, descriptors, options)
}

fn check(request: &StartRequest, descriptors: &[OwnedFd], options: &Options) -> Result<(), StartError> {
    let forbidden = |what, option, found| Err(StartError::Forbidden { what, option, found });
    if !options.users.contains(request.user) {
        return forbidden("this user", "--users", format!("{}, of {}", request.user, options.users));
    }
    if let Some(group) = request.groups.iter().find(|group| !options.groups.contains(group)) {
        return forbidden("this group", "--group", group.to_string());
    }
    if !options.programs.contains(&request.program) {
        return forbidden("this program", "--qemu", String::from_utf8_lossy(&request.program).into_owned());
    }
    match (descriptors.len(), request.descriptors) {
        (0, _) => Err(StartError::Descriptors { found: 0, said: request.descriptors }),
        (found, said) if found != said => Err(StartError::Descriptors { found, said }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Options {
        let words =
            ["--users", "2000-2999", "--group", "104", "--qemu", "/usr/bin/qemu", "--shim", "/shim.so"];
        match Options::parse(words.into_iter().map(Into::into)) {
            Ok(Parsed::Options(options)) => options,
            other => panic!("{other:?}"),
        }
    }

    /// A daemon that was taken over asks for more than it should.
    #[test]
    fn nothing_is_started_that_the_command_line_does_not_allow() {
        let request = StartRequest {
            user: 2000,
            groups: vec![104],
            descriptors: 1,
            program: b"/usr/bin/qemu".to_vec(),
            attach_socket: b"/run/memlane/attach.sock".to_vec(),
            arguments: Vec::new(),
        };
        let log = || vec![OwnedFd::from(std::fs::File::open("/dev/null").unwrap())];
        check(&request, &log(), &options()).unwrap();
        for (request, why) in [
            (StartRequest { user: 0, ..request.clone() }, "this user is not allowed by --users"),
            (StartRequest { user: 3000, ..request.clone() }, "3000, of 2000-2999"),
            (StartRequest { user: u32::MAX, ..request.clone() }, "this user"),
            (
                StartRequest { groups: vec![104, 0], ..request.clone() },
                "this group is not allowed by --group",
            ),
            (StartRequest { program: b"/bin/sh".to_vec(), ..request.clone() }, "/bin/sh"),
            (StartRequest { program: b"/usr/bin/../bin/qemu".to_vec(), ..request.clone() }, "--qemu"),
            (StartRequest { descriptors: 2, ..request.clone() }, "1 descriptors came"),
        ] {
            let told = check(&request, &log(), &options()).unwrap_err().to_string();
            assert!(told.contains(why), "{told}");
        }
        let told = check(&request, &[], &options()).unwrap_err().to_string();
        assert!(told.contains("0 descriptors came"), "{told}");
    }
}
