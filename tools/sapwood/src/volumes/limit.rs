//! Operations on what guests may do: limits, weights, reservations, groups.

use std::collections::BTreeMap;
use std::sync::Arc;

use sapwood_qos::names::Named;
use sapwood_store::LimitsChange;
use sapwood_store::rows::GroupRow;
use serde::{Deserialize, Serialize};

use super::answer::Done;
use super::change::said;
use super::operation::{Quick, operation};
use super::service::Service;
use crate::control::wire::Failure;

/// Tells all that is limited.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ShowLimits {}

/// Changes what a volume may do; what is not named stays as it is.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct LimitVolume {
    /// The volume.
    pub volume: String,
    /// Values by name; 0 takes one away.
    #[serde(default, skip_serializing_if = "Named::is_empty")]
    pub limits: Named,
    /// Forget all values that are not named.
    #[serde(default)]
    pub reset: bool,
    /// The group that it is to be in; null: none.
    #[serde(default, deserialize_with = "said", skip_serializing_if = "Option::is_none")]
    pub group: Option<Option<String>>,
}

/// The same for a group, which is made if there is none of that name.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct LimitGroup {
    /// The group.
    pub group: String,
    /// Values by name; 0 takes one away.
    #[serde(default, skip_serializing_if = "Named::is_empty")]
    pub limits: Named,
    /// Forget all values that are not named.
    #[serde(default)]
    pub reset: bool,
    /// The group that it is to be in; null: none.
    #[serde(default, deserialize_with = "said", skip_serializing_if = "Option::is_none")]
    pub parent: Option<Option<String>>,
}

/// Deletes a group in which nothing is.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DeleteGroup {
    /// The group.
    pub group: String,
}

/// What is limited.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct LimitsShown {
    /// Groups by name.
    pub groups: BTreeMap<String, GroupRow>,
    /// Volumes of which something is said, by name.
    pub volumes: BTreeMap<String, GroupRow>,
}

operation!(ShowLimits: Get "/v1/limits" -> LimitsShown);
operation!(LimitVolume: Post "/v1/volumes/{volume}/limits" -> LimitsShown);
operation!(LimitGroup: Post "/v1/groups/{group}/limits" -> LimitsShown);
operation!(DeleteGroup: Delete "/v1/groups/{group}" -> Done);

fn shown(service: &Service) -> Result<LimitsShown, Failure> {
    let limits = service.store().limits()?;
    let volumes = limits.volumes.into_iter().map(|(name, (_, row))| (name, row)).collect();
    Ok(LimitsShown { groups: limits.groups, volumes })
}

impl Quick for ShowLimits {
    fn run(self, service: &Arc<Service>) -> Result<LimitsShown, Failure> {
        shown(service)
    }
}

impl Quick for LimitVolume {
    fn run(self, service: &Arc<Service>) -> Result<LimitsShown, Failure> {
        let change = LimitsChange { limits: self.limits, reset: self.reset, group: self.group };
        service.store().limit_volume(&self.volume, &change)?;
        service.apply_limits()?;
        let mut shown = shown(service)?;
        shown.volumes.retain(|name, _| *name == self.volume);
        Ok(LimitsShown { groups: BTreeMap::new(), ..shown })
    }
}

impl Quick for LimitGroup {
    fn run(self, service: &Arc<Service>) -> Result<LimitsShown, Failure> {
        let change = LimitsChange { limits: self.limits, reset: self.reset, group: self.parent };
        service.store().limit_group(&self.group, &change)?;
        service.apply_limits()?;
        let mut shown = shown(service)?;
        shown.groups.retain(|name, _| *name == self.group);
        Ok(LimitsShown { volumes: BTreeMap::new(), ..shown })
    }
}

impl Quick for DeleteGroup {
    fn run(self, service: &Arc<Service>) -> Result<Done, Failure> {
        service.store().delete_group(&self.group)?;
        service.apply_limits()?;
        Ok(Done {})
    }
}
