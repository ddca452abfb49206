//! Who may use a volume: hosts by NVMe/TCP, guests by vfio-user; and how a guest is started.

use std::path::{Path, PathBuf};

use serde_json::json;
use weft_metadata::state::map::Volume;
use weft_metadata::state::{ClusterMap, Command as Proposal};
use weft_proto::grpc::admin::{AttachGuestRequest, DetachGuestRequest};
use weft_proto::nqn::Nqn;

use super::volume::{connect_lines, named};
use super::{Failure, Session};
use super::{admin, status_failure};
use crate::args::{AttachArgs, AttachmentArgs, VmCommand};
use crate::view;

impl Session {
    pub(super) async fn attach(&self, map: &ClusterMap, args: AttachArgs) -> Result<(), Failure> {
        let AttachArgs {
            attachment:
                AttachmentArgs {
                    name,
                    host,
                    vfio_user,
                    agent,
                },
            map_doorbells,
        } = args;
        let volume = named(map, &name)?;
        let host = host_of(map, volume, host)?;
        let allowed = volume.allowed_hosts.contains(&host);
        if !allowed {
            let (volume, host) = (volume.id, host.clone());
            self.propose(Proposal::AllowHost { volume, host }).await?;
        }
        let Some(path) = vfio_user else {
            let lines = connect_lines(map, volume);
            self.output.one(
                &json!({ "volume": name, "host": host, "subnqn": volume.subnqn, "connect": lines }),
                |_| {
                    format!(
                        "volume {name} serves {host}; on that host:\n{}\n",
                        lines.join("\n")
                    )
                },
            );
            return Ok(());
        };
        let request = AttachGuestRequest {
            volume: name.clone(),
            path: path.display().to_string(),
            map_doorbells,
        };
        let attached = match admin(&self.guest_agent(agent)).await {
            Ok(mut admin) => admin
                .attach_guest(request)
                .await
                .map(|_| ())
                .map_err(status_failure),
            Err(error) => Err(error),
        };
        if let Err(error) = attached {
            // As it was before.
            if !allowed {
                let volume = volume.id;
                self.propose(Proposal::DisallowHost { volume, host }).await?;
            }
            return Err(error);
        }
        let options = qemu_options(std::slice::from_ref(&path), MEMORY_MIB);
        self.output.one(
            &json!({ "volume": name, "host": host, "vfio_user": path, "qemu": options }),
            |_| {
                format!(
                    "volume {name} is an NVMe drive at {}; QEMU 10.1 or later takes it with:\n{}\n",
                    path.display(),
                    options.join(" \\\n")
                )
            },
        );
        Ok(())
    }

    pub(super) async fn detach(&self, map: &ClusterMap, args: AttachmentArgs) -> Result<(), Failure> {
        let AttachmentArgs {
            name,
            host,
            vfio_user,
            agent,
        } = args;
        let volume = named(map, &name)?;
        let host = host_of(map, volume, host)?;
        if let Some(path) = vfio_user {
            let request = DetachGuestRequest {
                volume: name.clone(),
                path: path.display().to_string(),
            };
            admin(&self.guest_agent(agent))
                .await?
                .detach_guest(request)
                .await
                .map_err(status_failure)?;
        }
        let id = volume.id;
        self.propose(Proposal::DisallowHost {
            volume: id,
            host: host.clone(),
        })
        .await?;
        self.output.one(&json!({ "volume": name, "host": host }), |_| {
            format!("volume {name} no longer serves {host}\n")
        });
        Ok(())
    }

    pub(super) fn vm(&self, command: VmCommand) {
        match command {
            VmCommand::Qemu { paths, memory_mib } => {
                let options = qemu_options(&paths, memory_mib);
                self.output.one(&json!({ "qemu": options }), |_| {
                    format!("{}\n", options.join(" \\\n"))
                });
            }
            VmCommand::Qmp { path, port } => {
                let command = json!({ "execute": "device_add", "arguments": hot_device(&path, port) });
                self.output
                    .one(&json!({ "qmp": command }), |_| format!("{command}\n"));
            }
        }
    }

    /// The agent on whose server a guest runs.
    fn guest_agent(&self, agent: Option<String>) -> String {
        agent
            .or_else(|| self.addresses.first().cloned())
            .unwrap_or_default()
    }
}

/// The host that was named, or the volume's guest.
fn host_of(map: &ClusterMap, volume: &Volume, host: Option<Nqn>) -> Result<Nqn, Failure> {
    match (host, &map.cluster) {
        (Some(host), _) => Ok(host),
        (None, Some(cluster)) => Ok(view::guest_nqn(cluster.id, &volume.name)),
        (None, None) => Err(Failure::Refused("the cluster has not been initialised".into())),
    }
}

/// Memory of a guest, where nothing else is asked for.
const MEMORY_MIB: u32 = 1024;

/// QEMU's options. Its memory has to be shared, and the device has to be given as JSON.
fn qemu_options(paths: &[PathBuf], memory_mib: u32) -> Vec<String> {
    let mut options = vec![
        format!("-m {memory_mib}"),
        format!("-object memory-backend-memfd,id=weft-memory,size={memory_mib}M,share=on"),
        "-machine q35,memory-backend=weft-memory".to_owned(),
    ];
    options.extend(
        paths
            .iter()
            .enumerate()
            .map(|(number, path)| device_option(number, path)),
    );
    options
}

fn device_option(number: usize, path: &Path) -> String {
    let mut device = device(format!("weft{number}"), path);
    // 0 is QEMU's own, for a kernel that is given to it.
    device["bootindex"] = (number + 1).into();
    // For a shell: a quote inside of quotes.
    format!("-device '{}'", device.to_string().replace('\'', r"'\''"))
}

/// The device as QEMU's monitor takes it, named after the port it is put into.
fn hot_device(path: &Path, port: String) -> serde_json::Value {
    let mut device = device(format!("weft-{port}"), path);
    device["bus"] = port.into();
    device
}

fn device(id: String, path: &Path) -> serde_json::Value {
    json!({
        "driver": "vfio-user-pci",
        "id": id,
        "socket": { "type": "unix", "path": path },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_options_of_qemu_share_its_memory_and_name_every_socket() {
        let options = qemu_options(&["/run/a".into(), "/run/it's".into()], 512);
        assert!(options[1].contains("memory-backend-memfd") && options[1].contains("share=on"));
        assert!(options[3].contains(r#""path":"/run/a""#));
        assert!(
            options[3].contains(r#""bootindex":1"#) && options[4].contains(r#""bootindex":2"#),
            "a kernel that is given to QEMU takes 0"
        );
        assert!(options[4].contains(r"/run/it'\''s"), "{}", options[4]);
    }
}
