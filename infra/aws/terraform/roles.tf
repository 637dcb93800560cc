# What Ray's nodes and MLflow's server may do: the store, nothing else. The policy is a file of its own,
# since a test runs the pipeline's storage under it and shows that it is enough and that all is needed.
resource "aws_iam_policy" "store" {
  name   = "adsc-store"
  policy = templatefile("${path.module}/../store-policy.json", { bucket = aws_s3_bucket.store.id })
}

locals {
  issuer  = replace(var.oidc_provider_arn, "/^.*oidc-provider\\//", "")
  for_pod = var.oidc_provider_arn == "" ? {} : { "adsc-store" = "adsc", "adsc-mlflow" = "mlflow" }
}

data "aws_iam_policy_document" "pod" {
  for_each = local.for_pod
  statement {
    actions = ["sts:AssumeRoleWithWebIdentity"]
    principals {
      type        = "Federated"
      identifiers = [var.oidc_provider_arn]
    }
    condition {
      test     = "StringEquals"
      variable = "${local.issuer}:sub"
      values   = ["system:serviceaccount:${var.namespace}:${each.value}"]
    }
    condition {
      test     = "StringEquals"
      variable = "${local.issuer}:aud"
      values   = ["sts.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "pod" {
  for_each           = local.for_pod
  name               = each.key
  assume_role_policy = data.aws_iam_policy_document.pod[each.key].json
}

resource "aws_iam_role_policy_attachment" "pod" {
  for_each   = local.for_pod
  role       = aws_iam_role.pod[each.key].name
  policy_arn = aws_iam_policy.store.arn
}

# Instance profiles for infra/aws/cluster.yaml.
data "aws_iam_policy_document" "ec2" {
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

resource "aws_secretsmanager_secret" "ray_token" {
  name        = "adsc/ray-token"
  description = "Ray's token; its value is put there by hand (infra/README.md)."
}

data "aws_iam_policy_document" "node" {
  statement {
    sid       = "ReadTheToken"
    actions   = ["secretsmanager:GetSecretValue"]
    resources = [aws_secretsmanager_secret.ray_token.arn]
  }
  statement {
    sid       = "PullTheImages"
    actions   = ["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"]
    resources = [for repository in aws_ecr_repository.image : repository.arn]
  }
  statement {
    sid       = "LogInToTheRegistry"
    actions   = ["ecr:GetAuthorizationToken"]
    resources = ["*"] # this action has no resource
  }
}

# The autoscaler on the head starts and ends its own workers.
data "aws_iam_policy_document" "autoscaler" {
  statement {
    sid = "Look"
    actions = [
      "ec2:DescribeInstances", "ec2:DescribeInstanceTypes", "ec2:DescribeSubnets", "ec2:DescribeVpcs",
      "ec2:DescribeSecurityGroups", "ec2:DescribeKeyPairs", "ec2:DescribeImages",
    ]
    resources = ["*"] # these actions have no resource
  }
  statement {
    sid       = "StartWorkers"
    actions   = ["ec2:RunInstances", "ec2:CreateTags"]
    resources = ["*"]
    condition {
      test     = "StringEquals"
      variable = "aws:RequestedRegion"
      values   = [var.region]
    }
  }
  statement {
    sid       = "EndOwnWorkers"
    actions   = ["ec2:TerminateInstances"]
    resources = ["*"]
    condition {
      test     = "StringEquals"
      variable = "aws:ResourceTag/ray-cluster-name"
      values   = ["adsc"]
    }
  }
  statement {
    sid       = "HandWorkersTheirProfile"
    actions   = ["iam:PassRole"]
    resources = [aws_iam_role.node["worker"].arn]
  }
}

resource "aws_iam_role" "node" {
  for_each           = toset(["head", "worker"])
  name               = "adsc-ray-${each.key}"
  assume_role_policy = data.aws_iam_policy_document.ec2.json
}

resource "aws_iam_instance_profile" "node" {
  for_each = aws_iam_role.node
  name     = each.value.name
  role     = each.value.name
}

resource "aws_iam_role_policy" "node" {
  for_each = aws_iam_role.node
  name     = "node"
  role     = each.value.id
  policy   = data.aws_iam_policy_document.node.json
}

resource "aws_iam_role_policy_attachment" "node" {
  for_each   = aws_iam_role.node
  role       = each.value.name
  policy_arn = aws_iam_policy.store.arn
}

resource "aws_iam_role_policy" "autoscaler" {
  name   = "autoscaler"
  role   = aws_iam_role.node["head"].id
  policy = data.aws_iam_policy_document.autoscaler.json
}
