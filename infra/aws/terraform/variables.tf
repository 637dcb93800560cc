variable "region" {
  description = "AWS region of bucket and registry."
  type        = string
  default     = "eu-central-1"
}

variable "bucket" {
  description = "Name of the store's bucket; bucket names are unique in all of AWS."
  type        = string
}

variable "oidc_provider_arn" {
  description = "The EKS cluster's OIDC provider, whose service accounts take the roles. Empty: no roles for pods."
  type        = string
  default     = ""
}

variable "namespace" {
  description = "Namespace of the service accounts adsc and mlflow."
  type        = string
  default     = "adsc"
}

variable "abort_uploads_after_days" {
  description = "Parts of uploads that never ended are deleted after so many days."
  type        = number
  default     = 2
}
