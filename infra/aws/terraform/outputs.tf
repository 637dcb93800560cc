output "root" {
  description = "For --root."
  value       = "s3://${aws_s3_bucket.store.id}/adsc"
}

output "roles" {
  description = "For the service accounts' annotation eks.amazonaws.com/role-arn."
  value       = { for name, role in aws_iam_role.pod : name => role.arn }
}

output "registry" {
  description = "For REGISTRY in the manifests."
  value       = { for name, repository in aws_ecr_repository.image : name => repository.repository_url }
}
