//! The keys of the configuration that name users and groups of this host.

use std::fs;

use memlane_guest::config::number_of;
use memlane_guest::toml_file::{FileError, Table, Value, or};
use memlane_protocol::wire::starter::GuestUsers;

use crate::api::access::{Access, Party, PartyId};

const USERS: &str = "a list of user names of /etc/passwd and numeric user ids, such as [\"root\", 990]";
const GROUPS: &str = "a list of group names of /etc/group and numeric group ids, such as [\"kvm\"]: neither root's \
                      group nor the daemon's own, whose members may give orders";
const PARTIES: &str = "a list of users and groups of /etc/passwd and /etc/group, groups with @ before them, or their \
                       numeric ids, such as [\"alice\", \"@memlane\", 1000, \"@990\"]";

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

/// Reads `attach_users`. Without it, the VMMs of root and of the daemon's own user may attach. The users of the guests that
/// this daemon starts are not among them.
pub(super) fn attach_users(table: &mut Table<'_>, guests: GuestUsers) -> Result<Vec<u32>, FileError> {
    let Some(value) = table.take("attach_users") else {
        let mut users = vec![0, rustix::process::geteuid().as_raw()];
        users.dedup();
        return Ok(users);
    };
    let user = |value: &Value<'_>| match user_id(value)? {
        user if guests.contains(user) => {
            Err(value.wrong(format!("users other than those of guests that this daemon starts ({guests})")))
        }
        user => Ok(user),
    };
    value.list(USERS)?.iter().map(user).collect()
}

/// Reads who QEMU runs as: users that are nobody else's, and groups that give it no right over the daemon.
pub(super) fn guest_users(table: &mut Table<'_>) -> Result<GuestUsers, FileError> {
    let own = rustix::process::geteuid().as_raw();
    or(table.take("users"), GuestUsers::default(), |value| {
        match value.parse::<GuestUsers>(GuestUsers::ALLOWED)? {
            users if users.contains(own) => {
                Err(value.wrong(format!("a range without {own}, the daemon's own user")))
            }
            users => Ok(users),
        }
    })
}

/// Reads the groups of guests' QEMUs. Names that this host does not have are left out.
pub(super) fn guest_groups(value: Value<'_>) -> Result<Vec<u32>, FileError> {
    let own = rustix::process::getegid().as_raw();
    let group = |value: &Value<'_>| {
        let found = match value.number() {
            Some(id) => Some(id),
            None => number_of(value.text(GROUPS)?, GROUP),
        };
        match found {
            Some(group) if group == 0 || group == own => Err(value.wrong(GROUPS)),
            found => Ok(found),
        }
    };
    let groups = value.list(GROUPS)?.iter().map(group).collect::<Result<Vec<_>, _>>()?;
    Ok(groups.into_iter().flatten().collect())
}

/// Reads the table `[api]`. Without it, the daemon's own group may order, and nobody may only look.
pub(super) fn access(table: &mut Table<'_>) -> Result<Access, FileError> {
    let mut access = Access::of_this_process();
    access.operators = vec![group(access.own_group)];
    let Some(mut table) = table.table("api")? else { return Ok(access) };
    if let Some(value) = table.take("operators") {
        access.operators = parties(value)?;
    }
    if let Some(value) = table.take("viewers") {
        access.viewers = parties(value)?;
    }
    table.finish()?;
    Ok(access)
}

fn user_id(value: &Value<'_>) -> Result<u32, FileError> {
    if let Some(id) = value.number() {
        return Ok(id);
    }
    number_of(value.text(USERS)?, PASSWD).ok_or_else(|| value.wrong(USERS))
}

fn parties(value: Value<'_>) -> Result<Vec<Party>, FileError> {
    value.list(PARTIES)?.iter().map(party).collect()
}

fn party(value: &Value<'_>) -> Result<Party, FileError> {
    if let Some(id) = value.number() {
        return Ok(Party { id: PartyId::User(id), name: id.to_string() });
    }
    let name = value.text(PARTIES)?;
    let id = match name.strip_prefix('@') {
        Some(group) => group.parse().ok().or_else(|| number_of(group, GROUP)).map(PartyId::Group),
        None => number_of(name, PASSWD).map(PartyId::User),
    };
    let id = id.ok_or_else(|| value.wrong(PARTIES))?;
    Ok(Party { id, name: name.to_owned() })
}

/// Describes a group by its number, with its name if it has one.
fn group(id: u32) -> Party {
    let text = fs::read_to_string(GROUP).unwrap_or_default();
    let named = text
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.len() > 2 && fields[2].parse() == Ok(id))
        .map(|fields| fields[0].to_owned());
    Party { id: PartyId::Group(id), name: format!("@{}", named.unwrap_or_else(|| id.to_string())) }
}
