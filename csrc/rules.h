// One line per rule. OZ_RULE(Rule), which each of them ends with, is defined by the file that includes this one.
#pragma once

#include "rules/adabelief.h"
#include "rules/adagradnorm.h"
#include "rules/dale.h"
#include "rules/diffgrad.h"
