# The registry of both images: a tag, once pushed, stays what it was.
resource "aws_ecr_repository" "image" {
  for_each             = toset(["adsc", "adsc-mlflow"])
  name                 = each.key
  image_tag_mutability = "IMMUTABLE"
  image_scanning_configuration {
    scan_on_push = true
  }
  encryption_configuration {
    encryption_type = "AES256"
  }
}
