//! The drives of this server: opened and locked once, labelled when they join the cluster, and from then on known
//! by their labels and not by their paths.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context as _, bail};
use weft_block::Device;
use weft_block::drive::{Drive, DriveOptions};
use weft_block::label::{self, AuthenticationKey, Found, Label, LabelError, Overwrite};
use weft_metadata::state::map::Cluster;
use weft_proto::band::DriveClass;
use weft_proto::id::{DriveId, DriveUuid, NodeId};

use crate::config::DriveConfig;

/// A drive of this server that is open and locked.
pub(crate) struct LocalDrive {
    pub(crate) path: PathBuf,
    pub(crate) class: DriveClass,
    pub(crate) drive: Drive,
    pub(crate) label: RefCell<Option<Found>>,
}

impl LocalDrive {
    /// Opens and locks the drive and reads its label. Writes nothing.
    ///
    /// # Errors
    /// Names the drive and what stands in the way.
    pub(crate) async fn open(config: &DriveConfig) -> anyhow::Result<Rc<Self>> {
        let options = DriveOptions {
            name: Some(metric_name(&config.path)),
            ..DriveOptions::default()
        };
        let drive = Drive::open(&config.path, options).await?;
        let label = match label::read(&drive.device()).await {
            Ok(found) => Some(found),
            Err(LabelError::Absent) => None,
            Err(error) => return Err(error).with_context(|| format!("drive {}", config.path.display())),
        };
        let class = parse_class(&config.class)?;
        Ok(Rc::new(Self {
            path: config.path.clone(),
            class,
            drive,
            label: RefCell::new(label),
        }))
    }

    /// The drive below all checks.
    pub(crate) fn device(&self) -> Device {
        self.drive.device()
    }

    /// Size in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.device().info().bytes()
    }

    /// Refuses a drive that `cluster` cannot take, before anything is written.
    ///
    /// # Errors
    /// Another cluster's label without `force`, or a drive that is too small.
    pub(crate) fn check(&self, cluster: &Cluster, force: bool) -> anyhow::Result<()> {
        let context = || format!("drive {}", self.path.display());
        if let Some(found) = &*self.label.borrow()
            && !force
        {
            let other = found.label.expect_cluster(cluster.id);
            other.with_context(|| format!("{}; use --force to overwrite it", context()))?;
        }
        self.fresh_label(cluster).with_context(context).map(|_| ())
    }

    /// Gives the drive a label of `cluster`, or keeps the one it has. Returns its identity.
    ///
    /// # Errors
    /// As [`LocalDrive::check`], or the drive refuses the write.
    pub(crate) async fn label(&self, cluster: &Cluster, force: bool) -> anyhow::Result<Label> {
        let known = self.label.borrow().clone();
        if let Some(found) = known.filter(|found| found.label.cluster == cluster.id) {
            return Ok(found.label);
        }
        let overwrite = if force {
            Overwrite::Forced
        } else {
            Overwrite::Refused
        };
        let found = label::format(&self.device(), &self.fresh_label(cluster)?, overwrite)
            .await
            .with_context(|| format!("drive {}", self.path.display()))?;
        let label = found.label.clone();
        *self.label.borrow_mut() = Some(found);
        Ok(label)
    }

    /// Writes the number that metadata gave into the label, where it is not there yet.
    ///
    /// # Errors
    /// The drive refuses the write.
    pub(crate) async fn record_id(&self, drive: DriveId, node: NodeId) -> anyhow::Result<()> {
        let Some(mut found) = self.label.borrow().clone() else {
            bail!("{} has no label", self.path.display())
        };
        if found.label.drive == Some(drive) && found.label.node == Some(node) && found.worse.is_none() {
            return Ok(());
        }
        let label = Label {
            drive: Some(drive),
            node: Some(node),
            ..found.label.clone()
        };
        label::update(&self.device(), &mut found, label)
            .await
            .with_context(|| format!("drive {}", self.path.display()))?;
        *self.label.borrow_mut() = Some(found);
        Ok(())
    }

    /// The identity on its label.
    pub(crate) fn uuid(&self) -> Option<DriveUuid> {
        self.label.borrow().as_ref().map(|found| found.label.drive_uuid)
    }

    fn fresh_label(&self, cluster: &Cluster) -> Result<Label, LabelError> {
        new_label(cluster, self.class, self.bytes())
    }
}

/// A label for a drive that has none.
pub(crate) fn new_label(cluster: &Cluster, class: DriveClass, bytes: u64) -> Result<Label, LabelError> {
    Label::new(
        cluster.id,
        AuthenticationKey(cluster.authentication_key),
        DriveUuid(rand::random()),
        class,
        bytes,
    )
}

/// As the configuration and the command line name it.
pub(crate) fn parse_class(class: &str) -> anyhow::Result<DriveClass> {
    Ok(match class {
        "scm" => DriveClass::Scm,
        "tlc" => DriveClass::Tlc,
        "qlc" => DriveClass::Qlc,
        other => bail!("class `{other}` is not one of scm, tlc, qlc"),
    })
}

/// The drive's name in metrics and in the cluster: the last part of its path.
pub(crate) fn metric_name(path: &Path) -> String {
    path.file_stem().map_or_else(
        || path.display().to_string(),
        |name| name.to_string_lossy().into_owned(),
    )
}
